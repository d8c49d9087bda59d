"""A moving average of the weights, with a memory in samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """w̄ ← d w̄ + (1 - d) w after each update of B samples, with d = exp(-B / memory).

    The memory does not depend on the batch: two updates of B decay the average as much as one of 2 B. The
    first update sets w̄ = w. Buffers are not averaged: running statistics, for instance, are averages already.
    Averages of 16-bit weights are float32, because 16 bits would round small changes away.

    Args:
        model: the model whose parameters are averaged.
        memory_samples: samples after which a weight's share has fallen to 1/e.
    """

    def __init__(self, model: nn.Module, memory_samples: float) -> None:
        self.model, self.memory_samples = model, memory_samples
        self._averages: list[Tensor] = []

    def update(self, samples: int) -> None:
        """Average the current weights, after an update of `samples` samples."""
        weights = [_float32_or_better(parameter.detach()) for parameter in averaged_parameters(self.model).values()]
        if not self._averages:
            self._averages = [weight.clone() for weight in weights]
        else:
            torch._foreach_lerp_(self._averages, weights, -math.expm1(-samples / self.memory_samples))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights within a `with` block."""
        parameters = [parameter.detach() for parameter in averaged_parameters(self.model).values()]
        kept = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, self._averages or kept)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name; empty before the first update."""
        return dict(zip(averaged_parameters(self.model), self._averages, strict=False))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self._averages = [
            state[name].to(_float32_or_better(parameter.detach()), copy=True)
            for name, parameter in averaged_parameters(self.model).items()
            if state
        ]


def averaged_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the floating-point parameters; integer parameters are never trained and have no average."""
    return {name: p for name, p in model.named_parameters() if p.is_floating_point()}


def averages_of(model: nn.Module) -> dict[str, Tensor]:
    """Return tensors with the types and shapes of the averages, on the meta device."""
    return {name: _float32_or_better(p.detach().to("meta")) for name, p in averaged_parameters(model).items()}


def _float32_or_better(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
