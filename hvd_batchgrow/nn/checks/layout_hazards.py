"""Find what makes the results of a network depend on how a batch is divided."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_batchgrow.data.datasets.example import InputForm
from hvd_batchgrow.data.tensor_tree import Tree, device_of
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.keyed_random import keyed_modules, set_sample_keys
from hvd_batchgrow.nn.state.side_effect_free import alike, cloned, dry_run, other_samples, trial_samples

NUM_SAMPLES = 7
"""Of each trial forward. Few tensors have 7 rows unless each row is a sample."""

WHOLE = "the network's own forward"
"""Reported if no submodule is the cause."""


def layout_hazards(model: nn.Module, form: InputForm) -> list[str]:
    """Return a line that names the modules that draw random numbers, or the one that mixes the samples of a batch.

    Modules such as dropout draw from the generator of their rank, in the order of its micro-batches. What they draw
    for a sample depends on how the batch was divided. Ghost norms are no hazard: their ghost batches are the same in
    every layout.

    Args:
        model: is not changed.
        form: shape of one input sample, (C, H, W) or (features,), or real samples.

    Returns:
        At most one line; empty if no hazard was found.
    """
    example = trial_samples(model, NUM_SAMPLES, form)
    with dry_run(model, NUM_SAMPLES, training=True) as before:
        for norm in ghost_norms(model):
            norm.training = False
        first = _Trace(model, example)
        before.restore(attributes=False)  # generators and counters among the attributes keep their new state
        set_sample_keys(keyed_modules(model), torch.arange(NUM_SAMPLES))
        drawing = first.drew or _first_difference(first, _Trace(model, example), NUM_SAMPLES)
    if drawing:
        paths = [path or WHOLE for path, _ in model.named_modules() if path in drawing]
        return [f"{listed(paths)}: random numbers that are not keyed by sample"]
    others = other_samples(example, keep=1)
    with dry_run(model, NUM_SAMPLES, training=True):
        for norm in ghost_norms(model):
            norm.training = False
        mixing = _first_difference(first, _Trace(model, others), 1)
    return [f"{path or WHOLE}: samples of a batch affect each other outside of ghost norms" for path in mixing]


class _Trace:
    """A forward pass: the outputs of the modules, and the modules that advance a global random generator.

    Args:
        model: its forward runs once.
        batch: the input.
    """

    def __init__(self, model: nn.Module, batch: Tree) -> None:
        self.drew: set[str] = set()
        self.outputs: dict[tuple[str, int], list[Tensor]] = {}
        """By path and number of the call, in the order in which the calls return; threads may change that order."""
        self._running: list[str] = []
        self._counts: Counter[str] = Counter()
        self._device = device_of(batch)
        self._states = _generator_states(self._device)
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda _module, _args, path=path: self._begin(path)))
            handles.append(module.register_forward_hook(lambda _module, _args, out, path=path: self._end(path, out)))
        try:
            model(cloned(batch))
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, path: str) -> None:
        self._observe()
        self._running.append(path)

    def _end(self, path: str, output: Any) -> None:
        self._observe()
        self._running.pop()
        self.outputs[path, self._counts[path]] = [tensor.detach().clone() for tensor in tensors_of(output)]
        self._counts[path] += 1

    def _observe(self) -> None:
        states = _generator_states(self._device)
        if states != self._states and self._running:
            self.drew.add(self._running[-1])
        self._states = states


def _generator_states(device: torch.device) -> tuple[Any, ...]:
    of_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    legacy = np.random.get_state(legacy=True)
    of_numpy = (legacy[1].tobytes(), *legacy[2:])  # type: ignore[index]
    return torch.get_rng_state().numpy().tobytes(), of_device, of_numpy, random.getstate()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an input or output of a module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def _first_difference(before: _Trace, after: _Trace, num_rows: int) -> list[str]:
    """Return the path of the first call to return whose output for the first samples differs, if there is one.

    Outputs that do not have a row for each sample in both forwards are skipped, such as those of an expert that gets
    some of the samples. A later module reveals their effect.
    """
    for call, ours in before.outputs.items():
        for pair in zip(ours, after.outputs.get(call, []), strict=False):
            if all(map(_has_rows, pair)) and not alike(pair[0][:num_rows], pair[1][:num_rows]):
                return [call[0]]
    return []


def _has_rows(tensor: Tensor) -> bool:
    """Return whether a tensor may have a row for each sample. Integers are skipped: often they index a sorted batch."""
    return tensor.shape[:1] == (NUM_SAMPLES,) and (tensor.is_floating_point() or tensor.is_complex())
