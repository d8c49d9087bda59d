"""Norms of the gradients of single passes, summed over passes and ranks, for the gradient noise scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.nn.parameters import gradient_strides
from hvd_batchgrow.train.update import exact as exact_sums
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate, estimate

_ROW = 1024
_EXACT_SCALE = 2.0**-20
"""Exact sums end at 2¹⁸: so those of squares may reach 2³⁸."""

ALL = "all"


class GradientNorms:
    """Σ |sᵢ|²/bᵢ over the passes of an update, sᵢ the sum of the gradients of the bᵢ samples of one.

    Args:
        members: parameters of each bucket, in the order in which they lie in it.
        groups: for each parameter the name of what it counts to, beside `ALL`; None: to nothing.
        exact: sum without rounding, so that no layout changes a bit.
        adam: its second moments scale gradients element by element; None: they are taken as they are.
    """

    def __init__(
        self,
        members: Sequence[Sequence[nn.Parameter]],
        *,
        groups: dict[nn.Parameter, str] | None = None,
        exact: bool = False,
        adam: torch.optim.Optimizer | None = None,
    ) -> None:
        self._members, self._exact, self._adam = members, exact, adam
        self.names = list(dict.fromkeys([ALL, *(groups[p] for bucket in members for p in bucket)] if groups else [ALL]))
        self._places = [[self.names.index(groups[p]) for p in bucket] for bucket in members] if groups else []
        self._scales: list[Tensor] = []
        self._device = members[0][0].device
        self._sums = self._zeros()
        self._num_gradients = 0
        self._handle: Any = None
        self._vector = torch.empty(0)

    def begin(self) -> None:
        """Before the passes of an update."""
        self._sums = self._zeros()
        self._num_gradients = 0
        self._scales = [self._scale_of(bucket) for bucket in self._members] if self._adam else []

    def _zeros(self) -> Tensor:
        zeros = torch.zeros(len(self.names), dtype=torch.float64, device=self._device)
        return exact_sums.split(zeros) if self._exact else zeros

    def add(self, index: int, gradient: Tensor, num_samples: int) -> None:
        """The gradient of a pass in one bucket, flat, summed over so many samples; each has to come once a pass."""
        squares = self._squares(index, gradient) / num_samples
        self._sums += exact_sums.split(squares * _EXACT_SCALE) if self._exact else squares
        self._num_gradients += index == 0

    def start(self, ranks: Ranks) -> None:
        """After the last pass: sum over the ranks what they have added."""
        count = torch.tensor([self._num_gradients], dtype=torch.float64, device=self._device)
        self._vector = torch.cat([self._sums.reshape(-1), count])
        self._handle = ranks.start_sum(self._vector, "gradient norms")

    def finish(self, ranks: Ranks, mean: Sequence[Tensor], batch: int, loss_scale: float) -> dict[str, NoiseEstimate]:
        """What the update says of the noise, by name; empty, where it had one pass on one rank.

        Args:
            ranks: those of `start`.
            mean: buckets of the gradient averaged over all samples, before it is clipped.
            batch: B.
            loss_scale: by which the gradients of the passes were too large.
        """
        ranks.wait(self._handle)
        *sums, count = self._vector.tolist()
        summed = torch.tensor(sums, dtype=torch.float64).view_as(self._sums)
        weighted = exact_sums.join(summed) / _EXACT_SCALE if self._exact else summed
        norms = sum(self._squares(index, bucket).cpu() for index, bucket in enumerate(mean))
        assert isinstance(norms, Tensor)
        estimates = {
            name: estimate(float(weighted[k]) / loss_scale**2, int(count), batch, float(norms[k]))
            for k, name in enumerate(self.names)
        }
        return {name: seen for name, seen in estimates.items() if seen is not None}

    def _squares(self, index: int, gradient: Tensor) -> Tensor:
        """float64 (names): squared norms of a bucket, whole and by group."""
        if self._scales:
            gradient = gradient * self._scales[index]
        if not self._places:
            return squared_norm(gradient).reshape(1)
        pieces = gradient.split([p.numel() for p in self._members[index]])
        each = torch.stack([squared_norm(piece) for piece in pieces])
        places = torch.tensor(self._places[index], device=self._device)
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=self._device).index_add_(0, places, each)
        sums[0] = each.sum()
        return sums

    def _scale_of(self, members: Sequence[nn.Parameter]) -> Tensor:
        """1/(√v̂ + eps) of each value of a bucket, as Adam scaled its last step; before its first 1."""
        assert self._adam is not None
        options = {p: group for group in self._adam.param_groups for p in group["params"]}
        scales = []
        for parameter in members:
            state, group = self._adam.state.get(parameter, {}), options[parameter]
            if "exp_avg_sq" not in state:
                scales.append(torch.ones(parameter.numel(), device=parameter.device))
                continue
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            # In the order in which the gradient lies in the bucket.
            like_gradient = corrected.new_empty_strided(parameter.shape, gradient_strides(parameter)).copy_(corrected)
            scales.append(1 / (like_gradient.as_strided((parameter.numel(),), (1,)).sqrt() + group["eps"]))
        return torch.cat(scales)


def squared_norm(flat: Tensor) -> Tensor:
    """Σ x² of a flat tensor, float64 (): in rows of 1024 values in their own precision, the rows in float64.

    A float32 sum over millions of values would be off by 1e-4, which the difference of two such sums cannot bear.
    """
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:]).double()
    total: Tensor = rows.square().sum() + rest.square()
    return total
