"""Find what makes the results of a network depend on how a batch is divided."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.data.datasets.example import InputForm
from hvd_batchgrow.data.tensor_tree import Tree, device_of, take_rows
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.nn.checks.gradient_hazards import gradient_hazards
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.keyed_random import keyed_modules, set_sample_keys
from hvd_batchgrow.nn.state.side_effect_free import (
    ALIKE,
    alike,
    cloned,
    dry_run,
    generator_states,
    tensors_of,
    trial_samples,
)

NUM_SAMPLES = 7
"""Of each trial forward. Few tensors have 7 rows unless each row is a sample."""

_PARTS = (slice(0, 3), slice(3, 7))
"""Samples of two more forwards, which together must give the outputs of one forward over all samples."""

WHOLE = "the network's own forward"
"""Reported if no submodule is the cause."""


def layout_hazards(model: nn.Module, form: InputForm) -> list[str]:
    """Return a line that names the modules that draw random numbers, or the one that mixes the samples of a batch.

    Otherwise, it names the parameters whose gradient depends on how the batch is divided.

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
        again = _Trace(model, example)
        drawing = first.drew or _first_difference(first, [(slice(None), again)], ALIKE)
    if drawing:
        paths = [path or WHOLE for path, _ in model.named_modules() if path in drawing]
        return [f"{listed(paths)}: random numbers that are not keyed by sample"]
    parts = []
    with dry_run(model, NUM_SAMPLES, training=True) as before:
        for norm in ghost_norms(model):
            norm.training = False
        for rows in _PARTS:
            before.restore(attributes=False)
            set_sample_keys(keyed_modules(model), torch.arange(NUM_SAMPLES)[rows])
            parts.append((rows, _Trace(model, take_rows(example, rows))))
    types = {tensor.dtype for tensor in (*model.parameters(), *first.tensors()) if tensor.is_floating_point()}
    tolerance = _tolerance(types, device_of(example))
    if mixing := _first_difference(first, parts, tolerance):
        return [f"{path or WHOLE}: samples of a batch affect each other outside of ghost norms" for path in mixing]
    if types & {torch.float16, torch.bfloat16}:  # rounding may change a sum of many such gradients by half
        return []
    return gradient_hazards(model, form, _outputs_with_rows(first, parts), tolerance)


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
        self._states = generator_states(self._device)
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda _module, _args, path=path: self._begin(path)))
            handles.append(module.register_forward_hook(lambda _module, _args, out, path=path: self._end(path, out)))
        try:
            model(cloned(batch))
        finally:
            for handle in handles:
                handle.remove()

    def tensors(self) -> Iterator[Tensor]:
        """Yield all outputs."""
        for outputs in self.outputs.values():
            yield from outputs

    def _begin(self, path: str) -> None:
        self._observe()
        self._running.append(path)

    def _end(self, path: str, output: Any) -> None:
        self._observe()
        self._running.pop()
        self.outputs[path, self._counts[path]] = [tensor.detach().clone() for tensor in tensors_of(output)]
        self._counts[path] += 1

    def _observe(self) -> None:
        states = generator_states(self._device)
        if states != self._states and self._running:
            self.drew.add(self._running[-1])
        self._states = states


_Parts = Sequence[tuple[slice, _Trace]]
"""Rows of the batch, and the forward over them alone."""


def _first_difference(whole: _Trace, parts: _Parts, tolerance: float) -> list[str]:
    """Return the path of the first call to return whose output for some samples differs, if there is one.

    Outputs that do not have a row for each sample in both forwards are skipped, such as those of an expert that gets
    some of the samples. A later module reveals their effect. So are integers: often they index a sorted batch.
    """
    for call, ours in whole.outputs.items():
        for rows, part in parts:
            for mine, other in zip(ours, part.outputs.get(call, []), strict=False):
                is_number = mine.is_floating_point() or mine.is_complex()
                if is_number and _have_rows(mine, rows, other) and not alike(mine[rows], other, tolerance):
                    return [call[0]]
    return []


def _outputs_with_rows(whole: _Trace, parts: _Parts) -> list[int]:
    """Return the indices of the floating-point tensors in the network's output that have a row for each sample."""
    output = ("", 0)
    columns = [trace.outputs.get(output, []) for trace in (whole, *(part for _, part in parts))]
    return [
        index
        for index, (mine, *others) in enumerate(zip(*columns, strict=False))
        if mine.is_floating_point()
        and all(_have_rows(mine, rows, other) for (rows, _), other in zip(parts, others, strict=True))
    ]


def _have_rows(whole: Tensor, rows: slice, part: Tensor) -> bool:
    """Return whether two outputs may have a row for each sample: one of the batch, one of some of its samples."""
    return whole.shape[:1] == (NUM_SAMPLES,) and part.shape[:1] == (len(range(NUM_SAMPLES)[rows]),)


def _tolerance(types: Collection[torch.dtype], device: torch.device) -> float:
    """Return the relative difference that rounding may cause: half of the digits of the least precise type.

    Passes over unequal numbers of samples may use different kernels, and those of a GPU may multiply in TF32.
    """
    eps = [torch.finfo(dtype).eps for dtype in types] + [2.0**-10] * (device.type == "cuda")
    return max([ALIKE, *map(math.sqrt, eps)])
