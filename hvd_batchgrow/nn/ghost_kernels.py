"""Ghost batch norm's arithmetic by PyTorch's own operations, on any device; ghost batches many at a time or one by one.

An input is folded so that its ghost batches are one dimension, a view where its layout allows it. They are then
worked on one by one, by PyTorch's kernel, or many at a time, whichever was faster on one thread of an EPYC with
AVX-512 (docs/ghost-batch-norm.md). Which it is depends on the shape of a ghost batch, not on their number:

- Rows of one sample and channel (NCHW), many at a time: nn.BatchNorm's kernel sums here by two chains of scalar
  additions in float64, which takes more than half of its time. Maps of few pixels one by one: a row has its price.
- Columns (NHWC, or no maps) one by one, since its kernel is good here; but its backward yields only the sums, because
  a gradient that it returned would have to be copied to its place. Small ghost batches many at a time: calls cost.
- 16 bits, or a GPU: one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SHORT_ROW = 20
"""Pixels; maps of fewer are worked on one by one."""
_SMALL_GHOST_BATCH = 2**16
"""Values; columns of fewer are worked on many at a time."""
_BLOCK = 2**20
"""Values worked on at a time, unless one ghost batch has more: they stay in the cache between the steps."""


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """Batch norm of each ghost batch, differentiable once (one ghost batch: any number of times).

    Args:
        x: (k·γ, C, …), of any floating type.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        num_groups: k.
        eps: added to the variance.
        relu: whether the output is max(0, ·).

    Returns:
        the output, of the shape, type and layout of x; and (k, 2, C), mean and unbiased variance of each
        ghost batch, which have no gradient, in float32 where x has 16 bits.
    """
    if num_groups == 1:
        y, statistics = _normalise_one(x, weight, bias, eps)
    else:
        y, statistics = _GhostNormalise.apply(x, weight, bias, num_groups, eps)  # type: ignore[no-untyped-call]
    return y.relu_() if relu else y, statistics


def _normalise_one(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    # Not empty: the kernel adds 0 times what is there, and of a NaN that is NaN.
    statistics = torch.zeros(1, 2, x.shape[1], dtype=_statistics_dtype(x), device=x.device)
    mean, variance = statistics[0]
    # With a momentum of 1 the kernel's running statistics are this ghost batch's own.
    y = nn.functional.batch_norm(
        x, mean, variance, _wide(weight, x), _wide(bias, x), training=True, momentum=1.0, eps=eps
    )
    return y, statistics


class _GhostNormalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = dense(x)
        ctx.fold, work, ctx.differentiate = _choose(x, num_groups)
        y = torch.empty_like(x)  # no view of something: the next layer may work in place
        folded, out = (ctx.fold.fold(tensor, num_groups) for tensor in (x, y))
        mean, inverse, statistics = work(ctx.fold, folded, _wide(weight, x), _wide(bias, x), eps, out)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.dtype = None if weight is None else weight.dtype
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:  # nothing depends on the output
            return (None,) * 5
        x, weight, mean, inverse = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        folded, dy, dx = (ctx.fold.fold(tensor, len(mean)) for tensor in (x, grad_y, grad_x))
        grads = ctx.differentiate(ctx.fold, dy, folded, _wide(weight, x), mean, inverse, dx)
        wanted = zip(ctx.needs_input_grad[1:3], grads, strict=True)
        grad_weight, grad_bias = (grad.to(ctx.dtype) if is_wanted else None for is_wanted, grad in wanted)
        return grad_x, grad_weight, grad_bias, None, None


def dense(x: Tensor) -> Tensor:
    """An input without gaps, its channels before or after its pixels."""
    channels_last = x.movedim(1, -1)
    if x.is_contiguous() or channels_last.is_contiguous():
        return x
    return channels_last.contiguous().movedim(-1, 1) if x.stride(1) == 1 else x.contiguous()


def _statistics_dtype(x: Tensor) -> torch.dtype:
    # A sum of squares in half precision would overflow.
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _wide(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(_statistics_dtype(x))


class _Rows:
    """Ghost batches as (k, γ, C, pixels); a row is one channel of one sample."""

    @staticmethod
    def fold(x: Tensor, num_groups: int) -> Tensor:
        return x.reshape(num_groups, x.shape[0] // num_groups, x.shape[1], -1)

    @staticmethod
    def spread(values: Tensor) -> Tensor:
        """(k, C), to be multiplied with what is folded."""
        return values[:, None, :, None]

    @staticmethod
    def mean(x: Tensor) -> Tensor:
        return x.sum(3).sum(1).div_(x[0].numel() // x.shape[2])

    @staticmethod
    def sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Σ dy and Σ dy (x - mean) (k, C)."""
        means = mean[:, None].expand(x.shape[:3]).reshape(-1)
        rows = (1, len(means), x.shape[3])
        dot, total = _sums_by_kernel(dy.view(rows), x.view(rows), means, torch.ones_like(means))
        return total.view(x.shape[:3]).sum(1), dot.view(x.shape[:3]).sum(1)

    @staticmethod
    def affine(x: Tensor, slope: Tensor, offset: Tensor, out: Tensor) -> None:
        """slope · x + offset."""
        slopes, offsets = (values[:, None].expand(x.shape[:3]).reshape(-1) for values in (slope, offset))
        rows, zeros, ones = (1, len(slopes), x.shape[3]), torch.zeros_like(slopes), torch.ones_like(slopes)
        # Batch norm in evaluation, of mean 0 and variance 1: what reads a row once and has no row-wise rival in torch.
        target = (out.view(rows), zeros[:0], zeros[:0])
        torch.native_batch_norm(x.view(rows), slopes, offsets, zeros, ones, False, 0.0, 0.0, out=target)


class _Columns:
    """Ghost batches as (k, γ · pixels, C)."""

    @staticmethod
    def fold(x: Tensor, num_groups: int) -> Tensor:
        return x.movedim(1, -1).reshape(num_groups, -1, x.shape[1])

    @staticmethod
    def spread(values: Tensor) -> Tensor:
        return values[:, None]

    @staticmethod
    def mean(x: Tensor) -> Tensor:
        return x.mean(1)

    @staticmethod
    def sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        if x[0].numel() < _SMALL_GHOST_BATCH:
            return dy.sum(1), (x - mean[:, None]).mul_(dy).sum(1)
        ones = torch.ones_like(mean[0])
        sums = [_sums_by_kernel(*group, ones) for group in zip(dy, x, mean, strict=True)]
        dot, total = (torch.stack(part) for part in zip(*sums, strict=True))
        return total, dot

    @staticmethod
    def affine(x: Tensor, slope: Tensor, offset: Tensor, out: Tensor) -> None:
        torch.addcmul(offset[:, None], x, slope[:, None], out=out)


_Fold = type[_Rows] | type[_Columns]
_Normalise = Callable[[_Fold, Tensor, Tensor | None, Tensor | None, float, Tensor], tuple[Tensor, Tensor, Tensor]]
_Differentiate = Callable[[_Fold, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _choose(x: Tensor, num_groups: int) -> tuple[_Fold, _Normalise, _Differentiate]:
    """How to fold an input, and how to work on it forward and backward."""
    num_pixels = x.numel() // (x.shape[0] * x.shape[1])
    is_columns = num_pixels == 1 or not x.is_contiguous()
    fold = _Columns if is_columns else _Rows
    one_by_one = fold, _normalise_each, _differentiate_each
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return one_by_one
    if is_columns:
        is_small = x.numel() < num_groups * _SMALL_GHOST_BATCH
        return fold, _normalise_blocks if is_small else _normalise_each, _differentiate_blocks
    return one_by_one if num_pixels < _SHORT_ROW else (fold, _normalise_blocks, _differentiate_blocks)


def _sums_by_kernel(dy: Tensor, x: Tensor, mean: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy (x - mean) and Σ dy of each channel: what batch norm's backward begins with, and all that is asked of it."""
    mask = [False, True, True]
    backward = torch.ops.aten.native_batch_norm_backward
    _, dot, total = backward(dy, x, None, None, None, mean, ones, True, 0.0, mask)
    return dot, total


def _cat(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors by a few of their ghost batches at a time; the first is what is counted."""
    num_groups = max(1, _BLOCK // tensors[0][0].numel())
    if num_groups >= len(tensors[0]):
        return [tensors]
    return zip(*(tensor.split(num_groups) for tensor in tensors), strict=True)


def _normalise_blocks(
    fold: _Fold, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and inverse deviation (k, C), and the statistics (k, 2, C); the output, to `out`."""
    statistics = x.new_empty(len(x), 2, x.shape[2])
    inverses = torch.empty_like(statistics[:, 0])
    num_values = x[0].numel() // x.shape[2]
    for x_block, moments, inverse, y in _blocks(x, statistics, inverses, out):
        mean, variance = moments.unbind(1)
        mean.copy_(fold.mean(x_block))
        torch.sub(x_block, fold.spread(mean), out=y)
        _, squares = fold.sums(y, y, torch.zeros_like(inverse))
        torch.div(squares, num_values - 1, out=variance)
        torch.div(squares, num_values, out=inverse).add_(eps).rsqrt_()
        slope = inverse if weight is None else inverse * weight
        fold.affine(y, slope, torch.zeros_like(slope) if bias is None else bias.expand_as(slope), y)
    return statistics[:, 0], inverses, statistics


def _differentiate_blocks(
    fold: _Fold, grad_y: Tensor, x: Tensor, weight: Tensor | None, means: Tensor, inverses: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; that of x, to `out`.

    With x̂ = (x - mean) · inverse and M values in a ghost batch,

        dx = weight · inverse · (dy - Σ dy / M - x̂ · Σ dy x̂ / M) = a · dy + b · x + c.
    """
    num_values = x[0].numel() // x.shape[2]
    grads = []
    for x_block, dy, mean, inverse, dx in _blocks(x, grad_y, means, inverses, out):
        total, dot = fold.sums(dy, x_block, mean)
        dot = dot * inverse
        a = inverse if weight is None else inverse * weight
        share = a * (-1 / num_values)
        b = share * inverse * dot
        fold.affine(x_block, b, torch.addcmul(share * total, b, mean, value=-1), dx)
        dx.addcmul_(dy, fold.spread(a))
        grads.append((dot, total))
    grad_weight, grad_bias = (_cat(part).sum(0) for part in zip(*grads, strict=True))
    return grad_weight, grad_bias


def _normalise_each(
    _: _Fold, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    moments = torch.zeros(4, len(x), x.shape[2], dtype=_statistics_dtype(x), device=x.device)
    for group, target, mean, variance, *saved in zip(x, out, *(part.unbind() for part in moments), strict=True):
        # As in _normalise_one, zeros and a momentum of 1.
        torch.native_batch_norm(group, weight, bias, mean, variance, True, 1.0, eps, out=(target, *saved))
    return moments[2], moments[3], moments[:2].transpose(0, 1)


def _differentiate_each(
    _: _Fold, grad_y: Tensor, x: Tensor, weight: Tensor | None, means: Tensor, inverses: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    backward, mask = torch.ops.aten.native_batch_norm_backward, [True, True, True]
    grads = []
    for dy, group, mean, inverse, dx in zip(grad_y, x, means, inverses, out, strict=True):
        grad_x, *rest = backward(dy, group, weight, None, None, mean, inverse, True, 0.0, mask)
        dx.copy_(grad_x)
        grads.append(rest)
    grad_weight, grad_bias = (torch.stack(part).sum(0) for part in zip(*grads, strict=True))
    return grad_weight, grad_bias
