"""Hooks and methods of a single module, which its replacement would lose."""

from __future__ import annotations

from torch import nn

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(*modules: nn.Module) -> bool:
    """Return whether any of these modules has hooks of its forward or backward."""
    return any(getattr(module, kind) for module in modules for kind in _KINDS)


def has_own_methods(module: nn.Module) -> bool:
    """Return whether the instance, not its class, has a `train` or `forward`."""
    return not {"train", "forward"}.isdisjoint(vars(module))
