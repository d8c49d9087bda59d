"""Noise that simulates rounding: repetitions with it measure how much rounding may change a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hvd_batchgrow.config import UpdateSection

NUM_REPEATS = 3
"""Number of repetitions with noise."""
MARGIN = 2.0
"""Rounding explains a difference of up to this many times the largest change that noise has caused."""
_NOISE_ULPS = 64


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
