"""Measure how much rounding may change each tensor of a network, and find tensors that changed by more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.nn.state.extra_state import is_extra_state

State = Mapping[str, Tensor]
"""Parameters and buffers by name."""
States = Mapping[int, State]
"""States by sample counter."""

NUM_REPEATS = 3
"""Number of runs with noise."""
_NOISE_ULPS = 64
_MARGIN = 2.0


def tensors_of(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the parameters and buffers of a `state_dict`, without the extra state of modules."""
    return {name: value for name, value in state_dict.items() if not is_extra_state(name)}


def noise_size(update: UpdateSection, network: nn.Module, device: torch.device) -> float:
    """Return the relative size of the noise that simulates rounding. It is larger than what a layout can cause.

    The size is 64 units in the last place of float32. A layout changes far fewer bits, but if a value is near the
    edge of a ReLU, a single bit decides, and the noise must be large enough to find such edges in a few repeats. If
    a 16-bit type or TF32 is used, the size is at least two of its units.

    Args:
        update: gives the types of the forward pass and of the gradients between ranks.
        network: gives the types of the parameters.
        device: on a GPU, torch may multiply in TF32, which has a 10-bit mantissa.
    """
    types = {parameter.dtype for parameter in network.parameters()}
    types |= {getattr(torch, name) for name in (update.precision, update.allreduce_dtype) if "float" in name}
    narrow = [2 * torch.finfo(kind).eps for kind in types & {torch.float16, torch.bfloat16}]
    is_tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    if device.type == "cuda" and is_tf32:
        narrow.append(2 * 2.0**-10)
    return max([_NOISE_ULPS * torch.finfo(torch.float32).eps, *narrow])


class Noise:
    """Random relative changes of one size, each up or down.

    Args:
        size: relative size of each change; 0: values stay as they are.
        seed: of the random signs.

    Source: Monte Carlo arithmetic, Parker 1997, here at the inputs of an update only.
    """

    def __init__(self, size: float, seed: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, values: Tensor) -> Tensor:
        """Return values · (1 ± size); integers are returned as they are."""
        if not self._size or not (values.is_floating_point() or values.is_complex()):
            return values
        signs = torch.randint(0, 2, values.shape, generator=self._generator, dtype=torch.int8) * 2 - 1
        return values + values * (signs.to(values.device) * self._size).to(values.dtype)

    @contextmanager
    def on_weights(self, network: nn.Module) -> Iterator[None]:
        """Add noise to the network's parameters, and restore them at the end."""
        parameters = [parameter.detach() for parameter in network.parameters()] if self._size else []
        before = [parameter.clone() for parameter in parameters]
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(self(value))
        try:
            yield
        finally:
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


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
                name: _MARGIN * max(_distance(value, repeat[samples][name]) for repeat in repeats) + _ulp(value)
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
            norm = _norm(value) or 1.0
            difference = _distance(value, state[name])
            yield Deviation(samples, name, difference / norm, self._limits[samples][name] / norm)


def _distance(first: Tensor, second: Tensor) -> float:
    """Return |a - b| in the 2-norm. Equal infinities count as equal, and so do two NaNs."""
    kind = torch.promote_types(first.dtype, torch.float64)
    first, second = first.to(kind), second.to(kind)
    is_equal = (first == second) | (first.isnan() & second.isnan())
    return float(torch.where(is_equal, 0, second - first).norm().abs())


def _norm(values: Tensor) -> float:
    """Return the 2-norm of the finite values: a mask may contain infinities."""
    return _distance(values, torch.where(values.isfinite(), 0, values))


def _ulp(values: Tensor) -> float:
    if not (values.is_floating_point() or values.is_complex()):
        return 0.0
    return torch.finfo(values.dtype).eps * _norm(values)
