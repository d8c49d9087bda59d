"""Gradients in flat buckets, summed over ranks while the last backward still runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.optim.parts import parts_of_size
from hvd_batchgrow.train.update import exact as exact_sums
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate
from hvd_batchgrow.train.update.gradient_norms import GradientNorms

_WIRE_SCALE = 2.0**10
"""float16 then holds the values of a mean gradient from 6e-11 to 64."""


class GradientBuckets:
    """Owns the gradients of a model: each `param.grad` is a slice of one of a few flat buckets.

    Backward adds into the slices, pass after pass. Between `start_when_ready` and `wait` the sum of
    a bucket over the ranks starts as soon as the backward has finished with its last parameter, so
    that only the last pass talks to the network, and does so while it computes.

    Args:
        parameters: those that are trained, in the order of the forward pass.
        ranks: to sum over.
        bucket_bytes: size at which a bucket is closed; large enough for bandwidth, small enough to overlap.
        exact: sum over passes and ranks without rounding, each pass being one group; the network is
            used after the last backward, not while it runs.
        wire_type: of what crosses the network, float16 or bfloat16; None: as the gradients are. One rank
            has nobody to send to, and rounds nothing.

    Raises:
        ValueError: the ranks cannot add numbers of that type, or no exact sum can be made of them.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        ranks: Ranks,
        bucket_bytes: int = 16 << 20,
        *,
        exact: bool = False,
        wire_type: torch.dtype | None = None,
    ) -> None:
        check_wire_type(wire_type, ranks, exact=exact)
        self.ranks = ranks
        self.exact = exact
        self._buckets: list[Tensor] = []
        self._unfinished: list[int] = []
        self._sizes: list[int] = []
        self._slices: list[tuple[nn.Parameter, Tensor]] = []
        self._handles: dict[int, Any] = {}
        self._armed = False
        self.members: list[Sequence[nn.Parameter]] = []
        self.norms: GradientNorms | None = None
        """Told of the gradient of each pass, before it is added to others."""
        self._passes_before: list[Tensor] = []
        """While there are norms: sums over the passes before, of each bucket."""
        self._num_passes_before = 0
        self._pass_samples = 0
        # Backward runs from the last parameter to the first: so do the buckets.
        for members in parts_of_size(list(parameters)[::-1], bucket_bytes):
            self._add_bucket(members)
        self._parts = [exact_sums.split(torch.zeros_like(bucket)) for bucket in self._buckets] if exact else []
        compress = wire_type if ranks.size > 1 else None
        self._wires = [bucket.to(compress) for bucket in self._buckets] if compress else []
        self._wire_scale = 1.0

    def zero(self) -> None:
        """Forget all gradients; the slices are where they were, also if somebody has put others in their place."""
        for parameter, slice_ in self._slices:
            if parameter.grad is not slice_:  # as `zero_grad` does
                parameter.grad = slice_
        torch._foreach_zero_(self._buckets)
        if self.exact:
            torch._foreach_zero_(self._parts)
        self._num_passes_before = 0
        if self.norms:
            self.norms.begin()

    def begin_pass(self, num_samples: int) -> None:
        """Before each backward: of how many samples it is."""
        self._pass_samples = num_samples

    def end_pass(self) -> None:
        """After each backward."""
        if self._armed:
            return
        if self.norms:
            for index, bucket in enumerate(self._buckets):
                self.norms.add(index, bucket, self._pass_samples)
        if self.exact:
            for bucket, parts in zip(self._buckets, self._parts, strict=True):
                parts.add_(exact_sums.split(bucket))
                bucket.zero_()
        elif self.norms:
            self._put_aside()

    def _put_aside(self) -> None:
        """Make room for the gradient of the next pass alone; in the end the sum has the bits it would have had."""
        if not self._passes_before:
            self._passes_before = [torch.zeros_like(bucket) for bucket in self._buckets]
        if self._num_passes_before:
            torch._foreach_add_(self._passes_before, self._buckets)
        else:
            torch._foreach_copy_(self._passes_before, self._buckets)
        torch._foreach_zero_(self._buckets)
        self._num_passes_before += 1

    def start_when_ready(self, divisor: float) -> None:
        """From now on each bucket is summed over the ranks as soon as it is complete: call before the last backward.

        Args:
            divisor: what the sums will be divided by. A sum over the samples of an update may be too large
                for float16, and a mean too small: what crosses the network is the mean times 2¹⁰.
        """
        self._wire_scale = _WIRE_SCALE / divisor
        self._unfinished = list(self._sizes)
        self._armed = not self.exact

    def start_rest(self) -> None:
        """After the last backward: start the sums that it has not started."""
        for index in range(len(self._buckets)):
            if index not in self._handles:  # a parameter that the loss did not reach
                self._start(index)
        self._armed = False
        if self.norms:
            self.norms.start(self.ranks)

    def wait(self) -> float:
        """Wait for all sums; returns the seconds waited."""
        begin = time.perf_counter()
        for handle in self._handles.values():
            self.ranks.wait(handle)
        self._handles.clear()
        for bucket, parts in zip(self._buckets, self._parts, strict=False):
            bucket.copy_(exact_sums.join(parts))
        for bucket, wire in zip(self._buckets, self._wires if self.ranks.size > 1 else [], strict=False):
            bucket.copy_(wire).div_(self._wire_scale)
        return time.perf_counter() - begin

    def noise(self, batch: int, loss_scale: float) -> dict[str, NoiseEstimate]:
        """Of the averaged gradient that is there now; see `GradientNorms.finish`. Empty without norms."""
        return self.norms.finish(self.ranks, self._buckets, batch, loss_scale) if self.norms else {}

    def divide(self, divisor: float) -> None:
        """Divide all gradients."""
        torch._foreach_div_(self._buckets, divisor)

    def norm(self) -> float:
        """2-norm of all gradients together; infinite or no number if any of them is."""
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(self._buckets)])
        return float(torch.linalg.vector_norm(norms))

    def _add_bucket(self, members: Sequence[nn.Parameter]) -> None:
        index = len(self._buckets)
        bucket = torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device)
        offset = 0
        for parameter in members:
            # The parameter's own strides: autograd adds in place, without a copy, for channels_last too.
            flat = bucket[offset : offset + parameter.numel()]
            slice_ = flat.as_strided(parameter.shape, parameter.stride())
            self._slices.append((parameter, slice_))
            parameter.grad = slice_
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._finish_one(index))
            offset += parameter.numel()
        self._buckets.append(bucket)
        self.members.append(members)
        self._sizes.append(len(members))

    def _finish_one(self, index: int) -> None:
        if not self._armed:
            return
        self._unfinished[index] -= 1
        if self._unfinished[index] == 0:
            self._start(index)

    def _start(self, index: int) -> None:
        if self.norms and self._armed:
            self.norms.add(index, self._buckets[index], self._pass_samples)
            if self._num_passes_before:
                self._buckets[index].add_(self._passes_before[index])
        summed = self._parts[index] if self.exact else self._buckets[index]
        if self._wires and self.ranks.size > 1:
            summed = torch.mul(summed, self._wire_scale, out=self._wires[index])
        self._handles[index] = self.ranks.start_sum(summed, f"gradients.{index}")


def wire_type_of(rule: UpdateSection) -> torch.dtype | None:
    """Of the gradients on their way between ranks; None: as they are."""
    return None if rule.compression == "none" else getattr(torch, rule.compression)


def check_wire_type(wire_type: torch.dtype | None, ranks: Ranks, *, exact: bool) -> None:
    """Raises ValueError as `GradientBuckets` does."""
    if wire_type is None or ranks.size == 1:
        return
    name = str(wire_type).removeprefix("torch.")
    if exact:
        raise ValueError(f"exact sums cannot be rounded to {name} on their way")
    if wire_type not in ranks.sum_types:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in ranks.sum_types)
        raise ValueError(f"{ranks.backend} cannot add {name}; it can: {allowed}")
