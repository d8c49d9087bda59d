"""Weights of classes or labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.wording import counted


def weights_of(weights: Sequence[float] | None, count: int, key: str, what: str) -> Tensor | None:
    """Return the weights that a key of `[task]` states, float32 (count,); None if the key is missing.

    Raises:
        JobError: the key has more or fewer numbers than `count`.
    """
    if weights is None:
        return None
    if len(weights) != count:
        raise JobError(
            [Fault(f"task.{key}", f"has {counted(len(weights), 'number')}, and the data has {count} {what}")]
        )
    return torch.tensor(weights)
