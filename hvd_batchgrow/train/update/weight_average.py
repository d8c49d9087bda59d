"""A moving average of the weights, with a memory fixed in samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """w̄ ← d w̄ + (1 - d) w after each update of B samples, with d = exp(-B / memory).

    The memory does not change when the batch grows: two updates of B forget as much as one of 2 B. The
    first update sets w̄ = w. Buffers, such as running statistics, are averages of their own and are not
    averaged again.

    Args:
        model: whose parameters are averaged.
        memory_samples: samples after which a weight's share has fallen to 1/e.
    """

    def __init__(self, model: nn.Module, memory_samples: float) -> None:
        self.model, self.memory_samples = model, memory_samples
        self._names = [name for name, _ in model.named_parameters()]
        self._averages: list[Tensor] = []

    def update(self, samples: int) -> None:
        """After an update of so many samples."""
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        if not self._averages:
            self._averages = [parameter.clone() for parameter in parameters]
        else:
            torch._foreach_lerp_(self._averages, parameters, -math.expm1(-samples / self.memory_samples))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averaged weights."""
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        kept = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, self._averages or kept)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by the name of their parameter; empty before the first update."""
        return dict(zip(self._names, self._averages, strict=False))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from averages of `state_dict`."""
        parameters = self.model.parameters()
        self._averages = (
            [state[n].to(p, copy=True) for n, p in zip(self._names, parameters, strict=True)] if state else []
        )
