"""A flat tensor of the gradients of several parameters, which are all-reduced together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.parameters import gradient_strides
from hvd_batchgrow.train.update.fixed_point import FixedPointSum

_WIRE_SCALE = 2.0**10
"""float16 then holds the values of a mean gradient from 6e-11 to 64."""
_HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Bucket:
    """Gradients of several parameters, concatenated in one flat tensor."""

    index: int
    members: Sequence[nn.Parameter]
    flat: Tensor
    """Their gradients: (n,)."""
    slices: list[Tensor]
    """The part of each member, in its shape."""
    wire: Tensor | None
    """The tensor that is all-reduced instead of `flat`, in another type: (n,)."""
    exact: FixedPointSum | None
    """In exact mode, the sum over the micro-batches; `flat` then holds the gradient of one alone."""
    earlier: Tensor | None = None
    """The sum over the earlier micro-batches of the update, if `flat` holds the gradient of one alone: (n,)."""
    reached: list[bool] = field(default_factory=list)
    """Which members have a gradient in this update."""
    accumulated: set[int] = field(default_factory=set)
    """Members whose gradient autograd has accumulated in this backward."""
    starts_last: bool = False
    """Whether autograd has ever accumulated a gradient in parts, which are complete only after the backward."""
    handle: Any = None

    @property
    def is_complete(self) -> bool:
        """Whether this backward has finished with all members. If `starts_last`, only its end shows that."""
        return len(self.accumulated) == len(self.members) and not self.starts_last

    @property
    def local_sum(self) -> Tensor:
        """This rank's gradient sum, of a bucket that adds 16-bit gradients to `earlier` after each backward pass.

        (n,), or in exact mode (n + 1,).
        """
        if self.exact:
            return self.exact.total
        return self.flat if self.earlier is None else self.earlier

    def restore(self, place: int) -> None:
        """Copy into its slice the gradient of a member that a hook of the network has replaced."""
        parameter, slice_ = self.members[place], self.slices[place]
        if parameter.grad is slice_:
            return
        if parameter.grad is None:
            slice_.zero_()
        else:
            slice_.copy_(parameter.grad)
        parameter.grad = slice_

    def set_aside(self) -> None:
        """Add the gradient of this backward pass to the sum over the earlier ones, and zero it."""
        if self.exact:
            self.exact.add(self.flat)
        else:
            self.sum_with_earlier()
        self.flat.zero_()

    def sum_with_earlier(self) -> Tensor:
        """Add the gradient of this backward pass to the sum over the earlier ones; return the sum."""
        if self.earlier is None:
            self.earlier = _float32_or_better(self.flat).zero_()
        return self.earlier.add_(self.flat)

    @property
    def is_half(self) -> bool:
        """Whether the parameters have 16 bits; their gradients are then summed in float32."""
        return self.flat.dtype in _HALF_TYPES

    @property
    def wire_scale(self) -> float:
        """The factor by which a mean gradient is multiplied before the all-reduce."""
        return _WIRE_SCALE if self.wire is not None and self.wire.dtype in _HALF_TYPES else 1.0


def make_bucket(index: int, members: Sequence[nn.Parameter], *, exact: bool, wire_type: torch.dtype | None) -> Bucket:
    """Return a bucket whose slices have the strides that autograd expects; see `GradientBuckets` for the arguments."""
    flat = torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device)
    slices = [
        # The strides that autograd expects: it adds in place, without a copy, for channels_last too.
        part.as_strided(parameter.shape, gradient_strides(parameter))
        for parameter, part in zip(members, flat.split([p.numel() for p in members]), strict=True)
    ]
    if wire_type is None and flat.dtype in _HALF_TYPES and not exact:
        wire_type = torch.float32
    return Bucket(
        index,
        members,
        flat,
        slices,
        wire=torch.zeros_like(flat, dtype=wire_type) if wire_type else None,
        exact=FixedPointSum(flat) if exact else None,
        reached=[False] * len(members),
    )


def _float32_or_better(flat: Tensor) -> Tensor:
    """Return a copy in float32 or wider, so that sums are not rounded to 16 bits."""
    return flat.to(torch.promote_types(flat.dtype, torch.float32), copy=True)
