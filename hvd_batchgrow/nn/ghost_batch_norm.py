"""Ghost batch norm: batch statistics over a fixed number of samples, however large the batch grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GhostBatchNorm(nn.Module):
    """Batch normalisation over ghost batches of γ consecutive samples of the stream.

    Each ghost batch i, with mean μᵢ and biased variance vᵢ per channel over its γ samples and all
    pixels, gives y = (x - μᵢ) / sqrt(vᵢ + eps) · weight + bias. Running statistics follow the ghost
    batches one by one in the order of the stream, with e = `momentum`:

        μ ← (1-e) μ + e μᵢ        so that after G of them   μ ← (1-e)ᴳ μ + Σᵢ e (1-e)ᴳ⁻¹⁻ⁱ μᵢ,  i = 0 … G-1,

    and likewise the variance, unbiased as in PyTorch. Their memory is fixed in samples (γ/e): it
    does not change when the batch grows. In evaluation it is `nn.BatchNorm1d` or `nn.BatchNorm2d`.

    Used alone, each forward in training commits its ghost batches. Inside an update that spans
    passes and ranks, `deferred` keeps them until `commit` is given the sum over all of them.

    A micro-batch of one ghost batch is normalised by what `nn.BatchNorm2d` calls, to the bit; of
    several, to rounding, in less time than by a loop, and without second derivatives. Inputs in
    channels_last give outputs and gradients in channels_last. Inputs of 16 bits, as under autocast,
    have statistics in float32.

    Shapes: input and output (k·γ, C), (k·γ, C, L) or (k·γ, C, H, W); running statistics, weight and
    bias (C,). The subclasses take what `nn.BatchNorm1d` and `nn.BatchNorm2d` take.

    Args:
        num_features: C.
        ghost_batch: γ, in samples.
        eps: added to the variance.
        momentum: e, the weight of one ghost batch in the running statistics, in (0, 1].
        affine: whether there are a weight and a bias; without, they are 1 and 0.

    Source: Hoffer et al. 2017 (arXiv 1705.08741), Algorithm 1, whose weights (1-e)ⁱ are a misprint:
    the recurrence above is meant. Ours deviates in that all ghost batches of an update, of all ranks
    and passes, enter the running statistics in the order of the stream, when it is over.
    """

    dimensions: ClassVar[tuple[int, ...]] = (2, 3, 4)

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, ghost_batch: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.ghost_batch = ghost_batch
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.deferred = False
        self._pending: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in training by the input's own ghost batches.

        Raises:
            ValueError: the shape is not that of such an input; in training, the number of samples
                is no multiple of γ, or a ghost batch has a single value for a channel.
        """
        self._check_shape(x)
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        num_groups = self._count_ghost_batches(x)
        y: Tensor
        if num_groups == 1:
            y = self._normalise_one(x)
        else:
            y = _GhostNormalise.apply(x, self.weight, self.bias, num_groups, self.eps, self._pending)  # type: ignore[no-untyped-call]
        if not self.deferred:
            self.commit(self.take_contributions(range(num_groups), num_groups).sum(0), num_groups)
        return y

    def _normalise_one(self, x: Tensor) -> Tensor:
        # Not empty: the kernel adds 0 times what is there, and of a NaN that is NaN.
        statistics = torch.zeros(1, 2, self.num_features, dtype=_statistics_dtype(x), device=x.device)
        self._pending.append(statistics)
        weight, bias = _wide(self.weight, x), _wide(self.bias, x)
        mean, variance = statistics[0]
        # With a momentum of 1 the kernel's running statistics are this ghost batch's own.
        return nn.functional.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps)

    def take_contributions(self, positions: Sequence[int], num_groups: int) -> Tensor:
        """What each ghost batch seen since the last call adds to the running statistics.

        Args:
            positions: place of each of them among the update's ghost batches, 0 … num_groups-1.
            num_groups: G, ghost batches of the whole update, over all ranks and passes.

        Returns:
            float64 (len(positions), 2, C): e (1-e)ᴳ⁻¹⁻ⁱ (μᵢ, vᵢ) for each position i.

        Raises:
            ValueError: it has seen another number of ghost batches.
        """
        statistics = self.take_statistics()
        if len(statistics) != len(positions):
            raise ValueError(
                f"{len(statistics)} ghost batches seen, {len(positions)} expected: does the model use a norm "
                "twice, not always, or again in the backward pass (checkpointing)?"
            )
        return self._weights(positions, num_groups, statistics)[:, None, None] * statistics

    def _weights(self, positions: Iterable[int], num_groups: int, like: Tensor) -> Tensor:
        return like.new_tensor([self.momentum * (1 - self.momentum) ** (num_groups - 1 - i) for i in positions])

    def take_statistics(self) -> Tensor:
        """Mean and unbiased variance of each ghost batch seen since they were last taken, float64 (k, 2, C)."""
        pending, self._pending = self._pending, []
        return (_cat(pending) if pending else self.running_mean.new_zeros(0, 2, self.num_features)).double()

    def commit(self, contributions: Tensor, num_groups: int) -> None:
        """Advance the running statistics by one update, given the sum (2, C) over all its ghost batches."""
        kept = (1 - self.momentum) ** num_groups
        for running, added in zip((self.running_mean, self.running_var), contributions, strict=True):
            running.copy_(torch.add(added, running, alpha=kept))  # in float64

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        affine = "" if self.affine else ", affine=False"
        return f"{self.num_features}, ghost_batch={self.ghost_batch}, eps={self.eps}, momentum={self.momentum}{affine}"

    def _check_shape(self, x: Tensor) -> None:
        if x.dim() not in self.dimensions or x.shape[1] != self.num_features:
            shapes = {2: "(n, C)", 3: "(n, C, L)", 4: "(n, C, H, W)"}
            allowed = " or ".join(shapes[dimensions] for dimensions in self.dimensions)
            raise ValueError(f"an input of shape {tuple(x.shape)}; expected {allowed} with C = {self.num_features}")

    def _count_ghost_batches(self, x: Tensor) -> int:
        num_groups, rest = divmod(x.shape[0], self.ghost_batch)
        if rest or not num_groups:
            raise ValueError(
                f"{x.shape[0]} samples are {x.shape[0] / self.ghost_batch:.2f} ghost batches of "
                f"{self.ghost_batch}: the micro-batch must be a multiple"
            )
        if x.numel() < 2 * num_groups * self.num_features:
            raise ValueError("a ghost batch of 1 sample of 1 pixel has no variance; it needs 2 samples or more")
        return num_groups


class GhostBatchNorm1d(GhostBatchNorm):
    """`GhostBatchNorm` of (k·γ, C) or (k·γ, C, L)."""

    dimensions = (2, 3)


class GhostBatchNorm2d(GhostBatchNorm):
    """`GhostBatchNorm` of (k·γ, C, H, W)."""

    dimensions = (4,)


def ghost_norms(model: nn.Module) -> Iterator[GhostBatchNorm]:
    """The ghost norms of a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, GhostBatchNorm))


# --- several ghost batches at once ----------------------------------------------------------------------
#
# An input is folded so that its ghost batches are one dimension, a view where its layout allows it. They are then
# worked on one by one, by PyTorch's kernel, or many at a time, whichever was faster on one thread of an EPYC with
# AVX-512 (docs/ghost-batch-norm.md). Which it is depends on the shape of a ghost batch, not on their number:
#
# - Rows of one sample and channel (NCHW), many at a time: nn.BatchNorm's kernel sums here by two chains of scalar
#   additions in float64, which takes more than half of its time. Maps of few pixels one by one: a row has its price.
# - Columns (NHWC, or no maps) one by one, since its kernel is good here; but its backward yields only the sums, because
#   a gradient that it returned would have to be copied to its place. Small ghost batches many at a time: calls cost.
# - 16 bits, or a GPU: one by one.

_SHORT_ROW = 20
"""Pixels; maps of fewer are worked on one by one."""
_SMALL_GHOST_BATCH = 2**16
"""Values; columns of fewer are worked on many at a time."""
_BLOCK = 2**20
"""Values worked on at a time, unless one ghost batch has more: they stay in the cache between the steps."""


class _GhostNormalise(torch.autograd.Function):
    """x (k·γ, C, …) -> y like x; to `pending` goes (k, 2, C), mean and unbiased variance of each ghost batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_groups: int,
        eps: float,
        pending: list[Tensor],
    ) -> Tensor:
        x = _dense(x)
        ctx.fold, normalise, ctx.differentiate = _choose(x, num_groups)
        y = torch.empty_like(x)  # no view of something: the next layer may work in place
        folded, out = (ctx.fold.fold(tensor, num_groups) for tensor in (x, y))
        mean, inverse, statistics = normalise(ctx.fold, folded, _wide(weight, x), _wide(bias, x), eps, out)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.dtype = None if weight is None else weight.dtype
        pending.append(statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        folded, dy, dx = (ctx.fold.fold(tensor, len(mean)) for tensor in (x, grad_y, grad_x))
        grads = ctx.differentiate(ctx.fold, dy, folded, _wide(weight, x), mean, inverse, dx)
        wanted = zip(ctx.needs_input_grad[1:3], grads, strict=True)
        grad_weight, grad_bias = (grad.to(ctx.dtype) if is_wanted else None for is_wanted, grad in wanted)
        return grad_x, grad_weight, grad_bias, None, None, None


def _dense(x: Tensor) -> Tensor:
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
        # As in _normalise_one.
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
