"""The autograd function of ghost batch norm that the GPU and the CPU kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Kernels(Protocol):
    """Kernels for inputs of one shape and layout."""

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, results: tuple[Tensor, ...], eps: float
    ) -> None:
        """Fill the results: y (like x), statistics (k, 2, C) and inverse standard deviations (k, C).

        The last two have the `statistics_dtype` of x.
        """

    def backward(self, saved: tuple[Tensor | None, ...], grad_x: Tensor, sums: Tensor) -> None:
        """Fill the gradient of x, and the sums (k, 2, C) that make up those of weight and bias.

        Args:
            saved: x, gradient of y, weight, bias, statistics, inverse standard deviations.
            grad_x: like x.
            sums: of each ghost batch, in the type of the statistics.
        """


class MakeKernels(Protocol):
    """Creates kernels."""

    def __call__(self, x: Tensor, num_ghost_batches: int, *, relu: bool) -> Kernels:
        """Return kernels for inputs like x, which is dense."""


KeepSums = Callable[[Tensor], None]
"""Receives the sums (k, 2, C) of a backward: each ghost batch's part of the gradients of weight and bias."""


class GhostNormalize(torch.autograd.Function):
    """`apply(make_kernels, x, weight, bias, num_ghost_batches, eps, relu, keep_sums)` returns output and statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        make_kernels: MakeKernels,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_ghost_batches: int,
        eps: float,
        relu: bool,
        keep_sums: KeepSums | None,
    ) -> tuple[Tensor, Tensor]:
        """Normalize each ghost batch."""
        x = dense(x)
        ctx.keep_sums = keep_sums
        ctx.kernels = make_kernels(x, num_ghost_batches, relu=relu)
        y, statistics, inverses = empty_results(x, num_ghost_batches)
        ctx.kernels.forward(x, weight, bias, (y, statistics, inverses), float(eps))
        ctx.save_for_backward(x, weight, bias, statistics, inverses)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        if grad_y is None:  # nothing depends on the output
            return (None,) * 8
        x, weight, bias, statistics, inverses = ctx.saved_tensors
        grad_x, sums = torch.empty_like(x), torch.empty_like(statistics)
        ctx.kernels.backward((x, laid_as(x, grad_y), weight, bias, statistics, inverses), grad_x, sums)
        if ctx.keep_sums:
            ctx.keep_sums(sums)
        of_weight, of_bias = sums.sum(0)
        return (
            None,
            grad_x,
            of_weight.to(weight.dtype) if ctx.needs_input_grad[2] else None,
            of_bias.to(bias.dtype) if ctx.needs_input_grad[3] else None,
            *(None,) * 4,
        )


def dense(x: Tensor) -> Tensor:
    """Return the input, or a dense copy of it, in contiguous or channels_last layout."""
    channels_last = x.movedim(1, -1)
    if x.is_contiguous() or channels_last.is_contiguous():
        return x
    return channels_last.contiguous().movedim(-1, 1) if x.stride(1) == 1 else x.contiguous()


def empty_results(x: Tensor, num_ghost_batches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors for the results of `Kernels.forward` of x, which is dense."""
    statistics = x.new_empty(num_ghost_batches, 2, x.shape[1], dtype=statistics_dtype(x))
    return torch.empty_like(x), statistics, torch.empty_like(statistics[:, 0])


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the type of the statistics of x: a sum of squares in 16 bits would overflow."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def laid_as(x: Tensor, grad: Tensor) -> Tensor:
    """Return a gradient in the layout of x. An expanded one, or one of another layout, is copied."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x, dtype=grad.dtype).copy_(grad)
