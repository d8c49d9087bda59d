"""Squared norms of the gradients of parts of an update, summed over all of them for the gradient noise scale.

The parts are its micro-batches or, for the norm layers alone, its ghost batches or samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.comm.to_device import to_device
from hvd_batchgrow.nn.norm_gradients import NormGradients
from hvd_batchgrow.nn.parameters import gradient_strides
from hvd_batchgrow.train.update import exact_sums
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate, estimate

_ROW = 1024
_EXACT_SCALE = 2.0**-28
"""Exact sums must stay below 2¹⁸, so sums of squares of gradients whose largest value is 1 may reach 2⁴⁶."""

ALL = "all"
NORM_LAYERS = "norm layers"
"""Name of the estimate from the units of `NormGradients`."""


class GradientNorms:
    """Σ |sᵢ|²/bᵢ over the micro-batches of an update: the sum sᵢ of the gradients of the bᵢ samples of one.

    Σ wᵢ²/bᵢ over the weights wᵢ of these samples is summed with it.

    Args:
        members: the parameters of each bucket, in the order of the bucket.
        groups: for each parameter the name of its layer group; None: only `ALL` is summed.
        exact: sum without rounding, so that all layouts give bit-identical sums.
        adam: the optimizer whose second moments scale the gradients element by element; None: no scaling.
        layers: records the gradients of norm layers, which `add_units` adds as `NORM_LAYERS`; None: they are skipped.
    """

    def __init__(
        self,
        members: Sequence[Sequence[nn.Parameter]],
        *,
        groups: dict[nn.Parameter, str] | None = None,
        exact: bool = False,
        adam: torch.optim.Optimizer | None = None,
        layers: NormGradients | None = None,
    ) -> None:
        self._members, self._exact, self._adam, self.layers = members, exact, adam, layers
        self.names = list(dict.fromkeys([ALL, *(groups[p] for bucket in members for p in bucket)] if groups else [ALL]))
        self._num_names = len(self.names)
        """Without the norm layers."""
        self.names += [NORM_LAYERS] if layers else []
        self._device = members[0][0].device
        self._selections = [self._selection(bucket, groups) for bucket in members] if groups else []
        self._scales: list[Tensor] = []
        self._num_gradients = self._num_units = 0
        self._is_single = False
        self._exact_scale = _EXACT_SCALE
        """That of |sᵢ|²/bᵢ; wᵢ²/bᵢ has `_EXACT_SCALE`."""
        self._sums = self._parts(self._zeros())
        """For each name Σ |sᵢ|²/bᵢ, then Σ wᵢ²/bᵢ of the micro-batches and of the units."""
        self._handle: Any = None
        self._vector = torch.empty(0)

    def begin(self, magnitude: int = 0, *, is_single: bool = False) -> None:
        """Reset the sums before the first micro-batch of an update.

        Args:
            magnitude: log2 of the largest value of the gradients, to which exact sums are scaled; equal on all ranks.
            is_single: whether the update is one micro-batch on one rank: `add` then does nothing.
        """
        self._sums, self._is_single = self._parts(self._zeros()), is_single
        self._num_gradients = self._num_units = 0
        self._scales = [self._scale_of(bucket) for bucket in self._members] if self._adam else []
        # Scaled by Adam, gradients have a magnitude near 1.
        self._exact_scale = _EXACT_SCALE if self._adam else _EXACT_SCALE * 2.0 ** (-2 * magnitude)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.names) + 2, dtype=torch.float64, device=self._device)

    def _parts(self, values: Tensor) -> Tensor:
        """Return what is added for these values: in exact mode their parts."""
        if not self._exact:
            return values
        return exact_sums.split(torch.cat([values[:-2] * self._exact_scale, values[-2:] * _EXACT_SCALE]))

    def add(self, index: int, gradient: Tensor, weight: Tensor | float, samples: int) -> None:
        """Add one bucket of a micro-batch's gradient. Call it once per bucket and micro-batch.

        Args:
            index: of the bucket.
            gradient: flat, summed over the samples of the micro-batch.
            weight: the sum of the weights of these samples.
            samples: number of these samples.
        """
        if self._is_single:
            return
        values = self._zeros()
        values[: self._num_names] = self._squares(index, gradient) / samples
        if index == 0:
            values[-2] = weight * weight / samples
            self._num_gradients += 1
        self._sums += self._parts(values)

    def add_units(self, gradients: Mapping[nn.Parameter, Tensor], weights: Tensor, samples: int) -> None:
        """Add a micro-batch's gradients of the norm layers.

        Args:
            gradients: from `NormGradients.end`, summed over the samples of each unit.
            weights: float64 (units,), the sum of the weights of these samples.
            samples: number of samples of a unit.
        """
        values = self._zeros()
        if gradients:
            norms = torch.linalg.vector_norm(torch.cat([*gradients.values()], 1), dim=1, dtype=torch.float64)
            values[self._num_names] = (norms.square() / samples).sum()
        values[-1] = (weights.square() / samples).sum()
        self._sums += self._parts(values)
        self._num_units += len(weights)

    def start(self, ranks: Ranks) -> None:
        """Start the all-reduce of the sums, after the last micro-batch."""
        counts = torch.tensor([self._num_gradients, self._num_units], dtype=torch.float64)
        self._vector = torch.cat([self._sums.reshape(-1), to_device(counts, self._device)])
        self._handle = ranks.start_all_reduce(self._vector, "gradient norms")

    def wait(self, ranks: Ranks) -> None:
        """Wait for the all-reduce that `start` has started."""
        ranks.wait(self._handle)

    def finish(
        self, ranks: Ranks, mean: Sequence[Tensor], batch: int, weight: float, loss_scale: float
    ) -> dict[str, NoiseEstimate]:
        """Wait for the all-reduce, and return the noise estimates by name, except those from a single gradient.

        In exact mode, an update whose sums are too large to be exact has no estimates.

        Args:
            ranks: those of `start`.
            mean: buckets of the gradient averaged over all samples, before it is clipped.
            batch: B.
            weight: W, the sum of the weights of all samples.
            loss_scale: the factor by which the gradients of the micro-batches are scaled.
        """
        self.wait(ranks)
        values = torch.cat([self._vector, *self._squares_of_means(mean)]).cpu()
        sums, counts, norms = values.tensor_split([-len(self.names) - 2, -len(self.names)])
        summed = sums.view(self._sums.shape)
        if self._exact:
            if not exact_sums.largest(summed) < exact_sums.LIMIT:
                return {}
            summed = exact_sums.join_unchecked(summed)
        squares = summed[:-2] / (self._exact_scale if self._exact else 1)
        weights = summed[-2:] / (_EXACT_SCALE if self._exact else 1)
        squares *= (batch / weight) ** 2 / loss_scale**2
        imbalances = (weights * batch / weight**2).tolist()
        estimates = {}
        for name, square, norm in zip(self.names, squares.tolist(), norms.tolist(), strict=True):
            kind = int(name == NORM_LAYERS)
            estimates[name] = estimate(square, int(counts[kind]), batch, norm, imbalances[kind])
        return {name: seen for name, seen in estimates.items() if seen is not None}

    def _squares_of_means(self, mean: Sequence[Tensor]) -> list[Tensor]:
        """Return the squared norms of the mean gradient, float64, for all names together."""
        if self._is_single:
            found = [self._sums.new_zeros(self._num_names)]
        else:
            found = [torch.stack([self._squares(index, bucket) for index, bucket in enumerate(mean)]).sum(0)]
        if self.layers:
            gradients = [p.grad.flatten() for p in self.layers.parameters if p.grad is not None]
            whole = torch.cat(gradients) if gradients else self._sums.new_zeros(1)
            found.append(torch.linalg.vector_norm(whole, dtype=torch.float64).square().reshape(1))
        return found

    def _squares(self, index: int, gradient: Tensor) -> Tensor:
        """Return float64 (names): the squared norms of a bucket, in total and by layer group."""
        if self._scales:
            gradient = gradient * self._scales[index]
        if not self._selections:
            return squared_norm(gradient).reshape(1)
        pieces = gradient.split([p.numel() for p in self._members[index]])
        each = torch.stack([squared_norm(piece) for piece in pieces])
        return self._selections[index] @ each

    def _selection(self, members: Sequence[nn.Parameter], groups: dict[nn.Parameter, str]) -> Tensor:
        """Return a matrix (names, members) of 0 and 1 that adds the members of each name, and all of them for `ALL`.

        A multiplication adds in a fixed order on every device; `index_add_` would not on a GPU.
        """
        rows = [[float(name in {ALL, groups[p]}) for p in members] for name in self.names[: self._num_names]]
        return torch.tensor(rows, dtype=torch.float64).to(self._device)

    def _scale_of(self, members: Sequence[nn.Parameter]) -> Tensor:
        """Return 1/(√v̂ + eps) for each value of a bucket, as in Adam's last step; 1 before the first step.

        It is 0 where v̂ is 0. Such values, as those of a token that has not occurred, have had no gradient. 1/eps would
        let the first one outweigh all others, though Adam divides by a v̂ that includes it.
        """
        assert self._adam is not None
        options = {p: group for group in self._adam.param_groups for p in group["params"]}
        scales = []
        for parameter in members:
            state, group = self._adam.state.get(parameter, {}), options[parameter]
            if "exp_avg_sq" not in state:
                scales.append(torch.ones(parameter.numel(), device=parameter.device))
                continue
            step = state["step"]
            # A fused Adam keeps its count on the device, and the host need not wait for it.
            num_steps = float(step) if step.device.type == "cpu" else step.double()
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** num_steps)
            # In the memory order of the gradient in the bucket.
            like_gradient = corrected.new_empty_strided(parameter.shape, gradient_strides(parameter)).copy_(corrected)
            root = like_gradient.as_strided((parameter.numel(),), (1,)).sqrt()
            scales.append((root > 0) / (root + group["eps"]))
        return torch.cat(scales)


def squared_norm(flat: Tensor) -> Tensor:
    """Return Σ x² of a flat tensor, float64 (): rows of 1024 values in their own precision, their sum in float64.

    A float32 sum over millions of values has an error of 1e-4, too large for the difference of two such sums.
    """
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:]).double()
    total: Tensor = rows.square().sum() + rest.square()
    return total
