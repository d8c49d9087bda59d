"""Ghost batch norm: batch norm over a fixed number of samples, independent of the batch size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.to_device import to_device
from hvd_batchgrow.nn.activation_checkpointing import is_recomputing
from hvd_batchgrow.nn.ghost import ghost_operators
from hvd_batchgrow.nn.ghost.ghost_choice import choose
from hvd_batchgrow.nn.ghost.ghost_function import KeepSums


class GhostBatchNorm(nn.Module):
    """Batch normalization over ghost batches of γ consecutive samples of the stream.

    For each ghost batch i, let μᵢ and vᵢ be the mean and the biased variance of a channel over its γ samples
    and all pixels. The output is y = (x - μᵢ) / sqrt(vᵢ + eps) · weight + bias. The running statistics are
    updated by one ghost batch after the other, in the order of the stream, with e = `momentum`:

        μ ← (1-e) μ + e μᵢ;       after G ghost batches   μ ← (1-e)ᴳ μ + Σᵢ e (1-e)ᴳ⁻¹⁻ⁱ μᵢ,  i = 0 … G-1,

    and likewise the variance, unbiased as in PyTorch. They average over a fixed number of samples (γ/e),
    which does not change when the batch grows. In evaluation, the module computes what `nn.BatchNorm1d` or
    `nn.BatchNorm2d` computes.

    If `frozen` is True, the norm stays in evaluation mode: `train()` does not change it.

    If `deferred` is False, each forward in training commits its ghost batches. In an update of several
    micro-batches or ranks, `deferred` is True, and the norm keeps the statistics until the caller passes
    their sum over all ghost batches to `commit`. A forward that activation checkpointing repeats counts once.

    On a CPU, one ghost batch is normalized by the function that `nn.BatchNorm2d` calls, bit-identically.
    Several are normalized by ghost_cpu.c if setup.py found a C compiler and they are float32: equal to
    rounding, faster than one batch norm over all of them, and without second derivatives. On a GPU, Triton
    kernels normalize any number of ghost batches with bit-identical results, if Triton is installed. Inputs in
    channels_last give outputs and gradients in channels_last. 16-bit inputs have statistics in float32.

    Shapes: input and output (k·γ, C), (k·γ, C, L) or (k·γ, C, H, W); running statistics, weight and
    bias (C,). The subclasses accept the shapes of `nn.BatchNorm1d` and `nn.BatchNorm2d`.

    Args:
        num_features: C.
        ghost_batch: γ, in samples.
        eps: added to the variance, >= 0.
        momentum: e, the weight of one ghost batch in the running statistics, in [0, 1]; 0: they never change.
        affine: whether the norm has a weight and a bias; otherwise they are 1 and 0.
        relu: whether the output is max(0, y). The kernels of this package compute it at no cost.

    Raises:
        ValueError: γ is not a positive integer, the momentum is not in [0, 1], or eps is below 0.

    Source: Hoffer et al. 2017 (arXiv 1705.08741), Algorithm 1. Its weights (1-e)ⁱ are a misprint of those of
    the recurrence above. Here all ghost batches of an update, of all ranks and micro-batches, enter the
    running statistics at the end of the update, in the order of the stream.
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
            raise ValueError(f"eps = {eps} must be >= 0: it is added to the variance")
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
        self.frozen = False
        self.keep_sums: KeepSums | None = None
        """Called in the backward of several ghost batches, or of a compiled forward."""
        self._pending: list[Tensor] = []
        self._number = ghost_operators.number_of(self)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; that of a frozen norm stays evaluation."""
        super().train(mode)
        self.training = self.training and not self.frozen
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, in training by the statistics of each ghost batch.

        Raises:
            ValueError: the input has a wrong shape; in training, the number of samples is not a
                multiple of γ, or a ghost batch has a single value per channel.
        """
        return self._normalize(x, relu=self.relu)

    def _normalize(self, x: Tensor, *, relu: bool) -> Tensor:
        self._check_shape(x)
        if not self.training:
            y = nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
            return y.relu_() if relu else y
        num_ghost_batches = self._count_ghost_batches(x)
        arguments = (x, self.weight, self.bias, num_ghost_batches, self.eps)
        if torch.compiler.is_compiling():
            y, statistics, _ = ghost_operators.ghost_normalize(*arguments, relu, self._number)
            ghost_operators.keep_statistics(statistics, ghost_operators.ORDER, self._number)
            return cast("Tensor", y)
        y, statistics = choose(x, num_ghost_batches)(*arguments, relu=relu, keep_sums=self.keep_sums)
        self.keep(statistics)
        return y

    def keep(self, statistics: Tensor) -> None:
        """Keep the statistics (k, 2, C) of a pass until the end of the update, or commit them.

        A pass that an activation checkpoint repeats has been counted.
        """
        if is_recomputing():
            return
        self._pending.append(statistics)
        if not self.deferred:
            num_ghost_batches = len(statistics)
            weights = torch.tensor(self.weights(range(num_ghost_batches), num_ghost_batches), dtype=torch.float64)
            weighted = to_device(weights, statistics.device)[:, None, None] * self.take_statistics()
            self.commit(weighted.sum(0), num_ghost_batches)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which compiled networks must not take for the original."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = ghost_operators.number_of(self)

    def weights(self, slots: Iterable[int], num_ghost_batches: int) -> list[float]:
        """Return e (1-e)ᴳ⁻¹⁻ⁱ for each slot i: the weight of a ghost batch in the running statistics.

        Args:
            slots: index of each ghost batch among those of the update, 0 … num_ghost_batches-1.
            num_ghost_batches: G, ghost batches of the whole update, over all ranks and micro-batches.
        """
        return [self.momentum * (1 - self.momentum) ** (num_ghost_batches - 1 - i) for i in slots]

    def take_pending(self) -> list[Tensor]:
        """Return the statistics (k, 2, C) of each pass since the last call."""
        pending, self._pending = self._pending, []
        return pending

    def take_statistics(self) -> Tensor:
        """Return mean and unbiased variance of each ghost batch since the last call, float64 (k, 2, C)."""
        pending = self.take_pending()
        return (torch.cat(pending) if pending else self.running_mean.new_zeros(0, 2, self.num_features)).double()

    def forget(self) -> None:
        """Discard the statistics since they were last taken, such as those of an update that failed."""
        self._pending = []

    def commit(self, contributions: Tensor, num_ghost_batches: int) -> None:
        """Advance the running statistics by one update, given the sum (2, C) over all its ghost batches."""
        kept = (1 - self.momentum) ** num_ghost_batches
        for running, added in zip((self.running_mean, self.running_var), contributions, strict=True):
            running.copy_(torch.add(added, running, alpha=kept))  # in float64

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load the state of an `nn.BatchNorm` too, ignoring its count of batches."""
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Return the arguments that `print(model)` shows."""
        flags = ("" if self.affine else ", affine=False") + (", relu=True" if self.relu else "")
        return f"{self.num_features}, ghost_batch={self.ghost_batch}, eps={self.eps}, momentum={self.momentum}{flags}"

    def _check_shape(self, x: Tensor) -> None:
        if x.dim() not in self.dimensions or x.shape[1] != self.num_features:
            shapes = {2: "(n, C)", 3: "(n, C, L)", 4: "(n, C, H, W)"}
            allowed = " or ".join(shapes[dimensions] for dimensions in self.dimensions)
            raise ValueError(f"input has shape {tuple(x.shape)}; expected {allowed} with C = {self.num_features}")

    def _count_ghost_batches(self, x: Tensor) -> int:
        num_ghost_batches = x.shape[0] // self.ghost_batch  # torch.compile has no divmod for sizes that change
        if x.shape[0] % self.ghost_batch or not num_ghost_batches:
            raise ValueError(
                f"{x.shape[0]} samples are {x.shape[0] / self.ghost_batch:.2f} ghost batches of "
                f"{self.ghost_batch}: the micro-batch must be a multiple of {self.ghost_batch}"
            )
        if x.numel() < 2 * num_ghost_batches * self.num_features:
            raise ValueError("a ghost batch of 1 sample of 1 pixel has no variance; it needs 2 samples or more")
        return num_ghost_batches


class GhostBatchNorm1d(GhostBatchNorm):
    """`GhostBatchNorm` for inputs (k·γ, C) or (k·γ, C, L)."""

    dimensions = (2, 3)


class GhostBatchNorm2d(GhostBatchNorm):
    """`GhostBatchNorm` for inputs (k·γ, C, H, W)."""

    dimensions = (4,)


def check_ghost_batch(ghost_batch: int) -> None:
    """Raise ValueError if a value is not a valid γ."""
    if not isinstance(ghost_batch, Integral) or ghost_batch < 1:
        raise ValueError(f"ghost_batch = {ghost_batch!r} must be a whole number of samples, 1 or more")


def ghost_norms(model: nn.Module) -> Iterator[GhostBatchNorm]:
    """Return an iterator over the ghost norms of a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, GhostBatchNorm))
