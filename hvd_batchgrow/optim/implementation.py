"""Choose how torch's optimizers compute a step: by fused kernels where the device has them, else by foreach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices


class Implementation(TypedDict):
    """Options of torch's optimizers."""

    foreach: bool
    fused: bool | None


PORTABLE: Implementation = {"foreach": True, "fused": None}
"""The options in a saved state, which another device may load."""


def implementation(parameters: Iterable[Tensor]) -> Implementation:
    """Return the options `foreach` and `fused` of torch's optimizers for some parameters.

    A fused kernel reads and writes each value once, and one launch updates many tensors. Its rounding differs from
    that of foreach, which a CPU keeps, so that weights there are bit-identical to those of earlier versions.
    """
    devices = {parameter.device.type for parameter in parameters}
    is_fused = "cpu" not in devices and devices <= set(_get_fused_kernels_supported_devices())
    return {"foreach": False, "fused": True} if is_fused else PORTABLE
