"""Ghost batch norm: batch statistics over a fixed number of samples, however large the batch grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class GhostBatchNorm(nn.Module):
    """Batch normalisation over ghost batches of γ consecutive samples of the stream.

    Each ghost batch i, with mean μᵢ and biased variance vᵢ per channel over its γ samples and all
    pixels, gives y = (x - μᵢ) / sqrt(vᵢ + eps) · weight + bias. Running statistics follow the ghost
    batches one by one in the order of the stream, with e = `momentum`:

        μ ← (1-e) μ + e μᵢ        so that after G of them   μ ← (1-e)ᴳ μ + Σᵢ e (1-e)ᴳ⁻¹⁻ⁱ μᵢ,  i = 0 … G-1,

    and likewise the variance, unbiased as in PyTorch. Their memory is fixed in samples (γ/e): it
    does not change when the batch grows. In evaluation it is `nn.BatchNorm2d`.

    Used alone, each forward in training commits its ghost batches. Inside an update that spans
    passes and ranks, `deferred` keeps them until `commit` is given the sum over all of them.

    Shapes: input and output (k·γ, C, …), as the subclasses say; running statistics, weight and bias (C,).

    Args:
        num_features: C.
        ghost_batch: γ, in samples.
        eps: added to the variance.
        momentum: e, the weight of one ghost batch in the running statistics, in (0, 1].

    Source: Hoffer et al. 2017 (arXiv 1705.08741), Algorithm 1, whose weights (1-e)ⁱ are a misprint:
    the recurrence above is meant.
    """

    running_mean: Tensor
    running_var: Tensor
    num_dims: tuple[int, ...]
    """Of the input."""

    def __init__(self, num_features: int, ghost_batch: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features = num_features
        self.ghost_batch = ghost_batch
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.deferred = False
        self._pending: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in training by the input's own ghost batches.

        Raises:
            ValueError: the input has another number of dimensions; or, in training, the number of samples is
                no multiple of γ.
        """
        if x.ndim not in self.num_dims:
            wanted = " or ".join(map(str, self.num_dims))
            raise ValueError(f"{type(self).__name__} takes {wanted} dimensions, got {x.ndim}: {tuple(x.shape)}")
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        if x.shape[0] == 0 or x.shape[0] % self.ghost_batch:
            raise ValueError(
                f"{x.shape[0]} samples are {x.shape[0] / self.ghost_batch:.2f} ghost batches of "
                f"{self.ghost_batch}: the micro-batch must be a multiple"
            )
        y: Tensor
        y, statistics = _GhostNormalise.apply(x, self.weight, self.bias, self.ghost_batch, self.eps)  # type: ignore[no-untyped-call]
        self._pending.append(statistics)
        if not self.deferred:
            num_groups = statistics.shape[0]
            self.commit(self.take_contributions(range(num_groups), num_groups).sum(0), num_groups)
        return y

    def take_contributions(self, positions: Sequence[int], num_groups: int) -> Tensor:
        """What each ghost batch seen since the last call adds to the running statistics.

        Args:
            positions: place of each of them among the update's ghost batches, 0 … num_groups-1.
            num_groups: G, ghost batches of the whole update, over all ranks and passes.

        Returns:
            float64 (len(positions), 2, C): e (1-e)ᴳ⁻¹⁻ⁱ (μᵢ, vᵢ) for each position i.
        """
        statistics = torch.cat(self._pending).double()
        self._pending = []
        age = num_groups - 1 - torch.tensor(positions, dtype=torch.float64, device=statistics.device)
        weights = self.momentum * (1 - self.momentum) ** age
        return weights[:, None, None] * statistics

    def commit(self, contributions: Tensor, num_groups: int) -> None:
        """Advance the running statistics by one update, given the sum (2, C) over all its ghost batches."""
        kept = (1 - self.momentum) ** num_groups
        for running, added in zip((self.running_mean, self.running_var), contributions, strict=True):
            running.copy_(running.double() * kept + added)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.num_features}, ghost_batch={self.ghost_batch}, eps={self.eps}, momentum={self.momentum}"


class GhostBatchNorm1d(GhostBatchNorm):
    """`GhostBatchNorm` of (n, C) or (n, C, L)."""

    num_dims = (2, 3)


class GhostBatchNorm2d(GhostBatchNorm):
    """`GhostBatchNorm` of (n, C, H, W)."""

    num_dims = (4,)


def ghost_norms(model: nn.Module) -> Iterator[GhostBatchNorm]:
    """The ghost norms of a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, GhostBatchNorm))


class _GhostNormalise(torch.autograd.Function):
    """PyTorch's own batch-norm kernel, once per ghost batch.

    Forward: x (k·γ, C, …) -> y of the same shape, and statistics (k, 2, C): mean and unbiased variance.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, ghost_batch: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        num_groups = x.shape[0] // ghost_batch
        # float32 even under autocast: a sum of squares in half precision would overflow
        statistics = weight.new_zeros(num_groups, 2, weight.shape[0])
        outputs, saved = [], []
        for chunk, (mean, variance) in zip(x.split(ghost_batch), statistics, strict=True):
            # With a momentum of 1 the kernel's running statistics are this ghost batch's own.
            y, *moments = torch.native_batch_norm(chunk, weight, bias, mean, variance, True, 1.0, eps)
            outputs.append(y)
            saved.extend(moments)
        ctx.save_for_backward(x, weight, *saved)
        ctx.ghost_batch, ctx.eps = ghost_batch, eps
        ctx.mark_non_differentiable(statistics)
        return outputs[0] if num_groups == 1 else torch.cat(outputs), statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = [], torch.zeros_like(weight), torch.zeros_like(weight)
        chunks = zip(grads[0].split(ctx.ghost_batch), x.split(ctx.ghost_batch), saved[::2], saved[1::2], strict=True)
        for grad_chunk, chunk, mean, inverse_deviation in chunks:
            d_x, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                grad_chunk,
                chunk,
                weight,
                None,
                None,
                mean,
                inverse_deviation,
                True,
                ctx.eps,
                [True, True, True],
            )
            grad_x.append(d_x)
            grad_weight += d_weight
            grad_bias += d_bias
        return grad_x[0] if len(grad_x) == 1 else torch.cat(grad_x), grad_weight, grad_bias, None, None
