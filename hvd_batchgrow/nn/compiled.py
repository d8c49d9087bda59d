"""A network compiled by torch, without what must not be compiled."""

from __future__ import annotations

import torch
from torch import nn

from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost_batch_norm import GhostBatchNorm


def compile_network(model: nn.Module) -> None:
    """Compile a network in place, so that its parameters keep their names.

    Ghost norms and keyed dropout run as they are, between compiled pieces: both keep something from
    a pass to the end of the update, which a compiled graph would not.

    Args:
        model: compiled for each kind of input at its first, in training and in evaluation.
    """
    for module in model.modules():
        if isinstance(module, (GhostBatchNorm, KeyedDropout)):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    model.compile()
