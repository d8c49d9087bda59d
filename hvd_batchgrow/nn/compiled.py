"""Compile a network with torch.compile."""

from __future__ import annotations

from torch import nn


def compile_network(model: nn.Module) -> None:
    """Compile a network in place, so that its parameters keep their names.

    Args:
        model: is compiled at the first input of each kind, in training and in evaluation. A copy is not compiled.
    """
    model.compile()
