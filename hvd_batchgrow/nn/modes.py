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


def norms_out_of_mode(model: nn.Module) -> list[str]:
    """Return the names of norms in evaluation mode that `model.train()` would put into training mode.

    A norm is a module with a buffer `running_mean`. If the model itself is in evaluation mode, so are its norms, and
    the result is empty.
    """
    if not model.training:
        return []
    norms = [
        (name, module)
        for name, module in model.named_modules()
        if not module.training and module._buffers.get("running_mean") is not None
    ]
    in_training = modes_of(model, training=True) if norms else {}
    return [name for name, module in norms if in_training[module]]
