"""A network compiled by torch, without what must not be compiled."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm


def compile_network(model: nn.Module) -> None:
    """Compile a network in place, so that its parameters keep their names.

    Ghost norms and keyed dropout run as they are, between compiled pieces: both keep something from
    a pass to the end of the update, which a compiled graph would not.

    Args:
        model: compiled for each kind of input at its first, in training and in evaluation. A copy of it is not.
    """
    kinds: set[Any] = {type(module) for module in model.modules()}
    for kind in kinds:
        if issubclass(kind, GhostBatchNorm | KeyedDropout):
            _leave_out(kind)
    model.compile()


@cache
def _leave_out(kind: Any) -> None:
    """Of the class, once: a method of an instance would stay that instance's in every copy of it."""
    kind.forward = torch.compiler.disable(kind.forward)
