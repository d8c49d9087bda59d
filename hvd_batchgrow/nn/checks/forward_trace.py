"""Forwards under watch: what each module gives, and who is running when a generator moves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Outputs = list[tuple[str, list[Tensor]]]
"""Path and outputs of each module, in the order in which they ended."""


class Witness:
    """Watches modules begin and end: puts each move of a generator down to the innermost one that is running."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: list[str] = []
        self._states = _generator_states(device)
        self.drew: set[str] = set()
        self.outputs: Outputs = []

    def begin(self, path: str) -> None:
        """A module's forward begins."""
        self._observe()
        self._running.append(path)

    def end(self, path: str, output: Any) -> None:
        """It ends."""
        self._observe()
        self._running.pop()
        self.outputs.append((path, [tensor.detach().clone() for tensor in _tensors(output)]))

    def _observe(self) -> None:
        states = _generator_states(self._device)
        if states != self._states and self._running:
            self.drew.add(self._running[-1])
        self._states = states


def witness(model: nn.Module, example: Tensor) -> Witness:
    """One forward under watch."""
    with _watched(model, example.device) as watching:
        model(example.clone())  # which a network may change in place
    return watching


@contextmanager
def _watched(model: nn.Module, device: torch.device) -> Iterator[Witness]:
    watching = Witness(device)
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _module, _args, path=path: watching.begin(path)))
        handles.append(module.register_forward_hook(lambda _module, _args, out, path=path: watching.end(path, out)))
    try:
        yield watching
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


def first_difference(before: Outputs, after: Outputs) -> Iterator[str]:
    """The first module to end whose output differs: none within it ended before with another one."""
    calls, others = numbered(before), numbered(after)
    for call in [*calls, *others]:
        ours, theirs = calls.get(call), others.get(call)
        if ours is None or theirs is None or len(ours) != len(theirs) or not all(map(alike, ours, theirs)):
            yield call[0]
            return


def numbered(outputs: Outputs) -> dict[tuple[str, int], list[Tensor]]:
    """Outputs by path and number of the call: modules that run in threads end in any order."""
    counts: Counter[str] = Counter()
    calls = {}
    for path, tensors in outputs:
        calls[path, counts[path]] = tensors
        counts[path] += 1
    return calls


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding: some kernels of GPUs add in any order."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.double(), theirs.double()
    scale = float(ours.nan_to_num().abs().max()) if ours.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
