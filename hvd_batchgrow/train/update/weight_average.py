"""A moving average of the weights and the running statistics, with a memory in samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """w̄ ← d w̄ + (1 - d) w after each update of B samples, with d = exp(-B / memory).

    The memory does not depend on the batch: two updates of B decay the average as much as one of 2 B. The
    first update sets w̄ = w. The running means and variances of norms are averaged like weights: those of the current
    weights belong to other activations. All other buffers are those of the current weights.
    Averages of 16-bit weights are float32, because 16 bits would round small changes away.

    Args:
        model: the model whose parameters and running statistics are averaged.
        memory_samples: samples after which a weight's share has fallen to 1/e.
    """

    def __init__(self, model: nn.Module, memory_samples: float) -> None:
        self.model, self.memory_samples = model, memory_samples
        self._averages: list[Tensor] = []

    def update(self, samples: int) -> None:
        """Average the current weights and running statistics, after an update of `samples` samples."""
        current = [_float32_or_better(tensor) for tensor in averaged_tensors(self.model).values()]
        if not self._averages:
            self._averages = [tensor.clone() for tensor in current]
        else:
            torch._foreach_lerp_(self._averages, current, -math.expm1(-samples / self.memory_samples))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights and running statistics within a `with` block."""
        kept = [tensor.clone() for tensor in averaged_tensors(self.model).values()]
        self._write(self._averages or kept)
        try:
            yield
        finally:
            self._write(kept)

    def _write(self, values: Sequence[Tensor]) -> None:
        # Look the tensors up each time: a forward pass may replace a buffer.
        torch._foreach_copy_(list(averaged_tensors(self.model).values()), list(values))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by the names of parameters and buffers; empty before the first update."""
        return dict(zip(averaged_tensors(self.model), self._averages, strict=False))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`. Running statistics that it lacks start from those of the model."""
        self._averages = [
            state.get(name, tensor).to(_float32_or_better(tensor), copy=True)
            for name, tensor in averaged_tensors(self.model).items()
            if state
        ]


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and running statistics, each once; integer parameters are never trained."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
    return parameters | running_statistics(model)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of norms."""
    names = ("running_mean", "running_var")
    return {name: b for name, b in model.named_buffers() if name.rpartition(".")[2] in names and b.is_floating_point()}


def averages_of(model: nn.Module) -> dict[str, Tensor]:
    """Return tensors with the types and shapes of the averages, on the meta device."""
    return {name: _float32_or_better(tensor.to("meta")) for name, tensor in averaged_tensors(model).items()}


def lack_statistics(averages: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Return whether averages lack the running statistics of a model that has some: an earlier version wrote them."""
    names = running_statistics(model).keys()
    return bool(averages and names) and names.isdisjoint(averages)


def set_averages(model: nn.Module, averages: Mapping[str, Tensor]) -> None:
    """Give a model averages from `WeightAverage.state_dict`; running statistics that they lack stay as they are."""
    tensors = averaged_tensors(model)
    for name, value in averages.items():
        tensors[name].copy_(value)


def _float32_or_better(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
