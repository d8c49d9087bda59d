"""Ghost batch norm: batch statistics over a fixed number of samples, however large the batch grows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.ghost.ghost_choice import choose
from hvd_batchgrow.nn.recompute import is_recomputing


class GhostBatchNorm(nn.Module):
    """Batch normalisation over ghost batches of γ consecutive samples of the stream.

    Each ghost batch i, with mean μᵢ and biased variance vᵢ per channel over its γ samples and all
    pixels, gives y = (x - μᵢ) / sqrt(vᵢ + eps) · weight + bias. Running statistics follow the ghost
    batches one by one in the order of the stream, with e = `momentum`:

        μ ← (1-e) μ + e μᵢ        so that after G of them   μ ← (1-e)ᴳ μ + Σᵢ e (1-e)ᴳ⁻¹⁻ⁱ μᵢ,  i = 0 … G-1,

    and likewise the variance, unbiased as in PyTorch. Their memory is fixed in samples (γ/e): it
    does not change when the batch grows. In evaluation it is `nn.BatchNorm1d` or `nn.BatchNorm2d`.

    Used alone, each forward in training commits its ghost batches. Inside an update that spans
    passes and ranks, `deferred` keeps them until `commit` is given the sum over all of them. A forward
    that activation checkpointing repeats in the backward pass counts once.

    On a CPU, a micro-batch of one ghost batch is normalised by what `nn.BatchNorm2d` calls, to the
    bit; of several, to rounding, in less time than as a whole by that (float32, where setup.py found
    a C compiler), and without second derivatives. On a GPU all are normalised by Triton's kernels
    where it is installed, one or several, to the same bits. Inputs in channels_last give outputs and
    gradients in channels_last. Inputs of 16 bits, as under autocast, have statistics in float32.

    Shapes: input and output (k·γ, C), (k·γ, C, L) or (k·γ, C, H, W); running statistics, weight and
    bias (C,). The subclasses take what `nn.BatchNorm1d` and `nn.BatchNorm2d` take.

    Args:
        num_features: C.
        ghost_batch: γ, in samples.
        eps: added to the variance, not below 0.
        momentum: e, the weight of one ghost batch in the running statistics, in [0, 1]; 0: they stay.
        affine: whether there are a weight and a bias; without, they are 1 and 0.
        relu: whether max(0, y) follows, in training as in evaluation: by kernels of ours it costs nothing.

    Raises:
        ValueError: γ is no whole number above 0, the momentum not in [0, 1], or eps below 0.

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
        self,
        num_features: int,
        ghost_batch: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        relu: bool = False,
    ) -> None:
        super().__init__()
        check_ghost_batch(ghost_batch)
        if momentum is None or not 0 <= momentum <= 1:
            raise ValueError(f"momentum = {momentum} must be in [0, 1]: the weight of one ghost batch")
        if not eps >= 0:
            raise ValueError(f"eps = {eps} must not be below 0: it is added to the variance")
        self.num_features = num_features
        self.ghost_batch = ghost_batch
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.relu = relu
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
        return self._normalise(x, relu=self.relu)

    def _normalise(self, x: Tensor, *, relu: bool) -> Tensor:
        self._check_shape(x)
        if not self.training:
            y = nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
            return y.relu_() if relu else y
        num_groups = self._count_ghost_batches(x)
        normalise = choose(x, num_groups)
        y, statistics = normalise(x, self.weight, self.bias, num_groups, self.eps, relu=relu)
        self._count(statistics, num_groups)
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a trace cannot ask whether a backward is running
    def _count(self, statistics: Tensor, num_groups: int) -> None:
        if is_recomputing():  # an activation checkpoint repeats a forward that is counted already
            return
        self._pending.append(statistics)
        if not self.deferred:
            self.commit(self.take_contributions(range(num_groups), num_groups).sum(0), num_groups)

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
                "twice, or not always?"
            )
        return self._weights(positions, num_groups, statistics)[:, None, None] * statistics

    def _weights(self, positions: Iterable[int], num_groups: int, like: Tensor) -> Tensor:
        weights = [self.momentum * (1 - self.momentum) ** (num_groups - 1 - i) for i in positions]
        # Not to wait for a GPU, which has the last forward still to do.
        return torch.tensor(weights, dtype=like.dtype).to(like.device, non_blocking=True)

    def take_statistics(self) -> Tensor:
        """Mean and unbiased variance of each ghost batch seen since they were last taken, float64 (k, 2, C)."""
        pending, self._pending = self._pending, []
        return (torch.cat(pending) if pending else self.running_mean.new_zeros(0, 2, self.num_features)).double()

    def forget(self) -> None:
        """Leave out what was seen since the statistics were last taken, as of an update that failed half-way."""
        self._pending = []

    def commit(self, contributions: Tensor, num_groups: int) -> None:
        """Advance the running statistics by one update, given the sum (2, C) over all its ghost batches."""
        kept = (1 - self.momentum) ** num_groups
        for running, added in zip((self.running_mean, self.running_var), contributions, strict=True):
            running.copy_(torch.add(added, running, alpha=kept))  # in float64

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Of `nn.BatchNorm` too, which counts batches."""
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        flags = ("" if self.affine else ", affine=False") + (", relu=True" if self.relu else "")
        return f"{self.num_features}, ghost_batch={self.ghost_batch}, eps={self.eps}, momentum={self.momentum}{flags}"

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


def check_ghost_batch(ghost_batch: int) -> None:
    """Raises ValueError if it is no γ."""
    if not isinstance(ghost_batch, Integral) or ghost_batch < 1:
        raise ValueError(f"ghost_batch = {ghost_batch!r} must be a whole number of samples, 1 or more")


def ghost_norms(model: nn.Module) -> Iterator[GhostBatchNorm]:
    """The ghost norms of a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, GhostBatchNorm))
