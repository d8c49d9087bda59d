"""Training and evaluation mode of the modules of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore the mode of each module at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def modes_of(model: nn.Module, *, training: bool) -> dict[nn.Module, bool]:
    """Return whether each module is in training mode after `model.train(training)`, which a network may override."""
    with kept_modes(model):
        model.train(training)
        return {module: module.training for module in model.modules()}
