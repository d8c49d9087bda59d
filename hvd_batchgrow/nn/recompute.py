"""Forwards that autograd runs a second time, in the backward pass: activation checkpointing."""

from __future__ import annotations

import torch


def is_recomputing() -> bool:
    """Whether this thread is inside a backward pass, where a module's forward only repeats an earlier one."""
    # As torch.utils.checkpoint itself finds out; torch has no public name for it.
    return torch._C._current_graph_task_id() != -1
