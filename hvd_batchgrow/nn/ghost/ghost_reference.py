"""Ghost batch norm by PyTorch's operations, for any type and device, one ghost batch after the other.

ghost_cpu.py and ghost_triton.py are faster. Tests compare them with this implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hvd_batchgrow.nn.ghost.ghost_function import dense


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """Normalise each ghost batch. Several are once differentiable, a single one any number of times.

    Args:
        x: (k·γ, C, …), of any floating type.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        num_groups: k.
        eps: added to the variance, >= 0.
        relu: whether the output is max(0, ·).

    Returns:
        The output, with the shape, type and layout of x; and (k, 2, C), mean and unbiased variance of each
        ghost batch, without gradient, float32 if x has 16 bits.
    """
    if num_groups == 1 and eps > 0:  # torch refuses eps = 0 in training
        y, statistics = _normalise_one(x, weight, bias, eps)
    else:
        y, statistics = _GhostNormalise.apply(x, weight, bias, num_groups, eps)  # type: ignore[no-untyped-call]
    return y.relu_() if relu else y, statistics


def _normalise_one(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    # Zeros, not empty: the kernel adds 0 times the old value, which must not be NaN.
    statistics = torch.zeros(1, 2, x.shape[1], dtype=_statistics_dtype(x), device=x.device)
    mean, variance = statistics[0]
    # With momentum 1, the kernel's running statistics become those of this ghost batch.
    batch_norm = partial(nn.functional.batch_norm, training=True, momentum=1.0, eps=eps)
    if weight is None or weight.dtype == statistics.dtype or weight.dtype != x.dtype:
        return batch_norm(x, mean, variance, _wide(weight, x), _wide(bias, x)), statistics
    # 16-bit parameters: batch_norm uses them directly, but then requires 16-bit running statistics.
    with torch.no_grad():
        batch_norm(x, mean, variance)
    return batch_norm(x, None, None, weight, bias), statistics


class _GhostNormalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = dense(x)
        ctx.fold = _choose_fold(x, num_groups)
        y = torch.empty_like(x)  # not a view: the next layer may change it in place
        wide = _wide(weight, x), _wide(bias, x)
        # Zeros and a momentum of 1, as in _normalise_one.
        moments = torch.zeros(4, num_groups, x.shape[1], dtype=_statistics_dtype(x), device=x.device)
        for group, out, mean, variance, *saved in zip(*map(ctx.fold, (x, y)), *moments, strict=True):
            torch.native_batch_norm(group, *wide, mean, variance, True, 1.0, eps, out=(out, *saved))
        ctx.save_for_backward(x, weight, *moments[2:])
        ctx.dtype = None if weight is None else weight.dtype
        statistics = moments[:2].transpose(0, 1)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:  # nothing depends on the output
            return (None,) * 5
        x, weight, means, inverses = ctx.saved_tensors
        grad_x, weight, grads = torch.empty_like(x), _wide(weight, x), []
        backward, mask = torch.ops.aten.native_batch_norm_backward, [True, True, True]
        for dy, group, dx, *saved in zip(*map(ctx.fold, (grad_y, x, grad_x)), means, inverses, strict=True):
            of_group, *of_parameters = backward(dy, group, weight, None, None, *saved, True, 0.0, mask)
            dx.copy_(of_group)
            grads.append(of_parameters)
        sums = (torch.stack(part).sum(0) for part in zip(*grads, strict=True))
        wanted = zip(ctx.needs_input_grad[1:3], sums, strict=True)
        return grad_x, *(grad.to(ctx.dtype) if is_wanted else None for is_wanted, grad in wanted), None, None


def _choose_fold(x: Tensor, num_groups: int) -> Callable[[Tensor], Tensor]:
    """Return a function that reshapes such tensors to (k, γ, C, pixels), or in channels_last to (k, γ · pixels, C)."""
    num_samples, num_channels = x.shape[0] // num_groups, x.shape[1]
    if x.is_contiguous() and x.numel() > x.shape[0] * num_channels:
        return lambda tensor: tensor.reshape(num_groups, num_samples, num_channels, -1)
    return lambda tensor: tensor.movedim(1, -1).reshape(num_groups, -1, num_channels)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    # A sum of squares in half precision would overflow.
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _wide(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(_statistics_dtype(x))
