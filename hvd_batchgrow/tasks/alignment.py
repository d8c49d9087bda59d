"""Check that the targets of a task have the shape of the network's outputs."""

from __future__ import annotations

from torch import Tensor

from hvd_batchgrow.messages.errors import RunError


def aligned(targets: Tensor, outputs: Tensor) -> Tensor:
    """Return targets in the type of the outputs (n, K); targets (n,) become (n, 1).

    Raises:
        RunError: they have other shapes, which would be broadcast.
    """
    found = targets[:, None] if targets.dim() == 1 else targets
    if found.shape != outputs.shape:
        raise RunError(f"the network's outputs are {tuple(outputs.shape)} and the targets {tuple(targets.shape)}")
    return found.to(outputs.dtype)
