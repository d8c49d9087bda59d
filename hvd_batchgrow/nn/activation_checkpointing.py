"""Detect activation checkpointing: forwards that autograd repeats in the backward pass."""

from __future__ import annotations

import torch


def is_recomputing() -> bool:
    """Return whether this thread is in a backward pass, where a module's forward repeats an earlier one."""
    # torch.utils.checkpoint uses the same function; torch has no public name for it.
    return torch._C._current_graph_task_id() != -1
