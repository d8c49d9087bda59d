"""Which modules of a model draw random numbers: what makes its results depend on the layout."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.dry_run import dry_run

_RANDOM_TYPES = ("Dropout", "DropPath", "StochasticDepth", "DropBlock")
"""Parts of the names of types that draw where their probability is above 0: torch's, torchvision's and timm's."""
_PROBABILITIES = ("p", "drop_prob", "prob")

WHOLE = "the network's own forward"
"""Named where no module within the network is to blame."""


def own_randomness(model: nn.Module, example: Tensor) -> list[str]:
    """Paths of the modules that make two forwards of the same input differ in training.

    Dropout and its like draw from a generator that each rank has for itself, in the order of its own
    passes: what they draw for a sample depends on how the batch was cut. Three ways to find them:

    - by type and probability, also those that this forward did not come by;
    - whoever is running, innermost, when a global generator of torch, NumPy or Python moves;
    - where none of these is found, and the outputs of two forwards differ all the same by more than
      rounding (a generator of its own, a counter): the innermost module whose output does.

    Args:
        model: stays as it is.
        example: two samples or more, on the model's device; not all alike, or a draw may not show.

    Returns:
        in the order of the model's modules; empty: none draws.
    """
    found = {path for path, module in model.named_modules() if _is_random(module)}
    first = _witness(model, example)
    found |= first.drew
    if not found:
        second = _witness(model, example)
        found = set(_first_difference(first.outputs, second.outputs))
    paths = [path for path, _ in model.named_modules() if path in found]
    return [path or WHOLE for path in paths]


def _is_random(module: nn.Module) -> bool:
    of_type = any(part in type(module).__name__ for part in _RANDOM_TYPES)
    given = (getattr(module, name, None) for name in _PROBABILITIES)
    return of_type and any(isinstance(p, (int, float)) and p > 0 for p in given)


class _Witness:
    """Watches modules begin and end: puts each move of a generator down to the innermost one that is running."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: list[str] = []
        self._states = _generator_states(device)
        self.drew: set[str] = set()
        self.outputs: list[tuple[str, list[Tensor]]] = []
        """Of each module, in the order in which they ended."""

    def begin(self, path: str) -> None:
        self._observe()
        self._running.append(path)

    def end(self, path: str, output: Any) -> None:
        self._observe()
        self._running.pop()
        self.outputs.append((path, [tensor.detach().clone() for tensor in _tensors(output)]))

    def _observe(self) -> None:
        states = _generator_states(self._device)
        if states != self._states and self._running:
            self.drew.add(self._running[-1])
        self._states = states


def _witness(model: nn.Module, example: Tensor) -> _Witness:
    """One forward in training under watch."""
    with dry_run(model, len(example), training=True), _watched(model, example.device) as witness:
        model(example)
    return witness


@contextmanager
def _watched(model: nn.Module, device: torch.device) -> Iterator[_Witness]:
    witness = _Witness(device)
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _module, _args, path=path: witness.begin(path)))
        handles.append(module.register_forward_hook(lambda _module, _args, out, path=path: witness.end(path, out)))
    try:
        yield witness
    finally:
        for handle in handles:
            handle.remove()


def _generator_states(device: torch.device) -> tuple[Any, ...]:
    of_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    legacy = np.random.get_state(legacy=True)
    of_numpy = (legacy[1].tobytes(), *legacy[2:])  # type: ignore[index]
    return torch.get_rng_state().numpy().tobytes(), of_device, of_numpy, random.getstate()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _first_difference(before: list[tuple[str, list[Tensor]]], after: list[tuple[str, list[Tensor]]]) -> Iterator[str]:
    """The first module to end whose output differs: none within it ended before with another one."""
    for (path, ours), (other_path, theirs) in zip(before, after, strict=False):
        if path != other_path or len(ours) != len(theirs) or not all(map(_alike, ours, theirs)):
            yield path
            return


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Up to rounding, which is not what is looked for: some kernels of GPUs add in any order."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.double(), theirs.double()
    scale = float(ours.nan_to_num().abs().max()) if ours.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
