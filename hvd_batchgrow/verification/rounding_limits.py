"""Measure how much rounding may change each tensor of a network, and find tensors that changed by more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.nn.state.extra_state import is_extra_state
from hvd_batchgrow.train.update.rounding_noise import MARGIN
from hvd_batchgrow.verification.tensor_distance import distance, norm

State = Mapping[str, Tensor]
"""Parameters and buffers by name."""
States = Mapping[int, State]
"""States by sample counter."""


def tensors_of(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the parameters and buffers of a `state_dict`, without the extra state of modules."""
    return {name: value for name, value in state_dict.items() if not is_extra_state(name)}


@dataclass(frozen=True)
class Deviation:
    """How far one tensor is from the reference."""

    samples: int
    """Sample counter of the compared states."""
    tensor: str
    difference: float
    """|a - b| / |a| in the 2-norm, a being the reference; |a - b| if a is 0."""
    limit: float
    """Largest difference that rounding explains, in the same unit."""

    @property
    def passed(self) -> bool:
        """Whether rounding explains the difference. A NaN difference is never explained."""
        return self.difference <= self.limit

    @property
    def share(self) -> float:
        """Difference divided by the limit."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.limit if self.limit and not math.isnan(self.difference) else math.inf


class RoundingLimits:
    """A limit for each tensor, measured by repeating the same updates with noise.

    A tensor may differ from the reference by twice the largest change that a repeat caused, plus one unit in
    the last place of all of its values.

    Args:
        reference: states without noise.
        repeats: states of each run with noise.
    """

    def __init__(self, reference: States, repeats: Sequence[States]) -> None:
        self._reference = reference
        self._limits = {
            samples: {
                name: MARGIN * max(distance(value, repeat[samples][name]) for repeat in repeats) + _ulp(value)
                for name, value in state.items()
            }
            for samples, state in reference.items()
        }

    def worst(self, states: States) -> Deviation:
        """Return the deviation with the largest ratio to its limit.

        Raises:
            RunError: the sample counters or the tensors differ from the reference's.
        """
        if list(states) != list(self._reference):
            raise RunError(f"the run has states at samples {[*states]}, plain autograd at {[*self._reference]}")
        deviations = [deviation for samples, state in states.items() for deviation in self._deviations(samples, state)]
        return max(deviations, key=lambda deviation: deviation.share)

    def _deviations(self, samples: int, state: State) -> Iterator[Deviation]:
        reference = self._reference[samples]
        shapes = [{name: tuple(value.shape) for name, value in tensors.items()} for tensors in (reference, state)]
        if shapes[0] != shapes[1]:
            names = sorted(str(name) for name, _ in shapes[0].items() ^ shapes[1].items())
            raise RunError(f"the run and plain autograd have different tensors: {', '.join(dict.fromkeys(names))}")
        for name, value in reference.items():
            size = norm(value) or 1.0
            difference = distance(value, state[name])
            yield Deviation(samples, name, difference / size, self._limits[samples][name] / size)


def _ulp(values: Tensor) -> float:
    if not (values.is_floating_point() or values.is_complex()):
        return 0.0
    return torch.finfo(values.dtype).eps * norm(values)
