"""Ghost batch norm by PyTorch's operations, for any type and device, one ghost batch after the other.

ghost_cpu.py and ghost_triton.py are faster. Tests compare them with this implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.ghost.ghost_function import GhostNormalize, KeepSums, statistics_dtype


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_ghost_batches: int,
    eps: float,
    *,
    relu: bool = False,
    keep_sums: KeepSums | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize each ghost batch. Several are once differentiable, a single one any number of times.

    Args:
        x: (k·γ, C, …), of any floating type.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        num_ghost_batches: k.
        eps: added to the variance, >= 0.
        relu: whether the output is max(0, ·).
        keep_sums: is called in a backward over several ghost batches.

    Returns:
        The output, with the shape, type and layout of x; and (k, 2, C), mean and unbiased variance of each
        ghost batch, without gradient, float32 if x has 16 bits.
    """
    if num_ghost_batches > 1 or eps == 0:  # torch refuses eps = 0 in training
        return GhostNormalize.apply(PytorchKernels, x, weight, bias, num_ghost_batches, eps, relu, keep_sums)  # type: ignore[no-untyped-call,no-any-return]
    y, statistics = _normalize_one(x, weight, bias, eps)
    return y.relu_() if relu else y, statistics


def _normalize_one(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    # Zeros, not empty: the kernel adds 0 times the old value, which must not be NaN.
    statistics = torch.zeros(1, 2, x.shape[1], dtype=statistics_dtype(x), device=x.device)
    mean, variance = statistics[0]
    # With momentum 1, the kernel's running statistics become those of this ghost batch.
    batch_norm = partial(nn.functional.batch_norm, training=True, momentum=1.0, eps=eps)
    if weight is None or weight.dtype == statistics.dtype or weight.dtype != x.dtype:
        return batch_norm(x, mean, variance, _wide(weight, x), _wide(bias, x)), statistics
    # 16-bit parameters: batch_norm uses them directly, but then requires 16-bit running statistics.
    with torch.no_grad():
        batch_norm(x, mean, variance)
    return batch_norm(x, None, None, weight, bias), statistics


class PytorchKernels:
    """PyTorch's batch norm on one ghost batch after the other."""

    def __init__(self, x: Tensor, num_ghost_batches: int, *, relu: bool) -> None:
        self._fold, self._relu = _choose_fold(x, num_ghost_batches), relu

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, results: tuple[Tensor, ...], eps: float
    ) -> None:
        """See `ghost_function.Kernels`."""
        y, statistics, inverses = results
        wide = _wide(weight, x), _wide(bias, x)
        statistics.zero_()  # a momentum of 1 adds 0 times the old value, which must not be NaN
        mean = torch.empty_like(inverses[0])
        for group, out, (running, variance), inverse in zip(
            self._fold(x), self._fold(y), statistics, inverses, strict=True
        ):
            torch.native_batch_norm(group, *wide, running, variance, True, 1.0, eps, out=(out, mean, inverse))
        if self._relu:
            y.relu_()

    def backward(self, saved: tuple[Tensor | None, ...], grad_x: Tensor, sums: Tensor) -> None:
        """See `ghost_function.Kernels`."""
        x, grad_y, weight, bias, statistics, inverses = cast("tuple[Tensor, ...]", saved)
        wide_weight, wide_bias = _wide(weight, x), _wide(bias, x)
        parts = zip(*map(self._fold, (grad_y, x, grad_x)), statistics[:, 0], inverses, sums, strict=True)
        for dy, group, dx, mean, inverse, of_group in parts:
            if self._relu:
                dy = dy * (_affine(group, mean, inverse, wide_weight, wide_bias) > 0)  # noqa: PLW2901
            grads = torch.ops.aten.native_batch_norm_backward(
                dy, group, wide_weight, None, None, mean, inverse, True, 0.0, [True, True, True]
            )
            for target, grad in zip((dx, *of_group), grads, strict=True):
                target.copy_(grad)


def _affine(x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    channels = (-1, *[1] * (x.dim() - 2))
    y = (x - mean.view(channels)) * (inverse if weight is None else inverse * weight).view(channels)
    return y if bias is None else y + bias.view(channels)


def _choose_fold(x: Tensor, num_ghost_batches: int) -> Callable[[Tensor], Tensor]:
    """Return a function that reshapes such tensors to (k, γ, C, pixels), or in channels_last to (k, γ · pixels, C)."""
    num_samples, num_channels = x.shape[0] // num_ghost_batches, x.shape[1]
    if x.is_contiguous() and x.numel() > x.shape[0] * num_channels:
        return lambda tensor: tensor.reshape(num_ghost_batches, num_samples, num_channels, -1)
    return lambda tensor: tensor.movedim(1, -1).reshape(num_ghost_batches, -1, num_channels)


def _wide(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(statistics_dtype(x))
