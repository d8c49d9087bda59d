"""Compile a network with torch.compile, except for ghost norms and keyed dropout."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm


def compile_network(model: nn.Module) -> None:
    """Compile a network in place, so that its parameters keep their names.

    Ghost norms and keyed dropout run uncompiled between compiled graphs: both keep state from a pass until
    the end of the update, which a compiled graph would not.

    Args:
        model: is compiled at the first input of each kind, in training and in evaluation. A copy is not compiled.
    """
    kinds: set[Any] = {type(module) for module in model.modules()}
    for kind in kinds:
        if issubclass(kind, GhostBatchNorm | KeyedDropout):
            _exclude(kind)
    model.compile()


@cache
def _exclude(kind: Any) -> None:
    """Exclude a class, once. A changed method of an instance would stay bound to it in each copy."""
    kind.forward = torch.compiler.disable(kind.forward)
