"""Trace a forward pass: the output of each module, and the modules that draw random numbers."""

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
"""Path and outputs of each call of a module, in the order in which the calls returned."""


class ForwardTrace:
    """Records the outputs of modules, and the innermost running module whenever a random generator advances."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: list[str] = []
        self._states = _generator_states(device)
        self.drew: set[str] = set()
        self.outputs: Outputs = []

    def begin(self, path: str) -> None:
        """Record that a module's forward begins."""
        self._observe()
        self._running.append(path)

    def end(self, path: str, output: Any) -> None:
        """Record that a module's forward returns `output`."""
        self._observe()
        self._running.pop()
        self.outputs.append((path, [tensor.detach().clone() for tensor in _tensors(output)]))

    def _observe(self) -> None:
        states = _generator_states(self._device)
        if states != self._states and self._running:
            self.drew.add(self._running[-1])
        self._states = states


def trace_forward(model: nn.Module, example: Tensor) -> ForwardTrace:
    """Run one traced forward pass."""
    with _traced(model, example.device) as trace:
        model(example.clone())  # a clone: a network may change its input in place
    return trace


@contextmanager
def _traced(model: nn.Module, device: torch.device) -> Iterator[ForwardTrace]:
    trace = ForwardTrace(device)
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _module, _args, path=path: trace.begin(path)))
        handles.append(module.register_forward_hook(lambda _module, _args, out, path=path: trace.end(path, out)))
    try:
        yield trace
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
    """Yield the path of the first call to return whose output differs, if there is one."""
    calls, others = numbered(before), numbered(after)
    for call in [*calls, *others]:
        ours, theirs = calls.get(call), others.get(call)
        if ours is None or theirs is None or len(ours) != len(theirs) or not all(map(alike, ours, theirs)):
            yield call[0]
            return


def numbered(outputs: Outputs) -> dict[tuple[str, int], list[Tensor]]:
    """Return outputs by path and number of the call: modules that run in threads return in any order."""
    counts: Counter[str] = Counter()
    calls = {}
    for path, tensors in outputs:
        calls[path, counts[path]] = tensors
        counts[path] += 1
    return calls


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding: some GPU kernels add in varying order."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.double(), theirs.double()
    scale = float(ours.nan_to_num().abs().max()) if ours.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
