"""Copy from the host to a device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a CPU tensor on a device; the tensor itself if it is there already.

    The copy to a GPU goes through pinned memory: from other memory, the host would wait for it. torch does not reuse
    the pinned memory before the copy is done.
    """
    if host.device.type == device.type:
        return host
    pinned = host if host.is_pinned() else host.pin_memory()
    return pinned.to(device, non_blocking=True)
