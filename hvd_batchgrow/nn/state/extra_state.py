"""Extra state of modules (`get_extra_state`): check that a checkpoint can hold it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.state.saved_state import kept_state

_KEY = "_extra_state"
_SCALARS = (bool, int, float, str, bytes, type(None))


def is_extra_state(name: str) -> bool:
    """Return whether a name in a `state_dict` belongs to a module's extra state."""
    return name.rpartition(".")[2] == _KEY


def plain_fault(value: Any, path: str = "") -> str | None:
    """Return which part of a tree is neither a plain value nor a dense tensor; None if all parts are.

    Plain values are bool, int, float, str, bytes, None, and lists, tuples and dicts of these with keys
    of str or int. Loading them runs no code.
    """
    if type(value) in _SCALARS:
        return None
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta:
        return None
    if type(value) in (list, tuple):
        items = list(enumerate(value))
    elif type(value) in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
        items = list(value.items())
    else:
        return f"{path or 'it'} is of class {type(value).__module__}.{type(value).__name__}".replace("builtins.", "")
    return next((fault for key, part in items if (fault := plain_fault(part, f"{path}[{key!r}]"))), None)


def state_dict_fault(model: nn.Module) -> str | None:
    """Return why a network's `state_dict` cannot be saved and loaded; None if it can.

    Args:
        model: is not changed.
    """
    try:
        with kept_state(model):
            state = model.state_dict()
            for name, value in state.items():
                if not isinstance(value, Tensor) and not is_extra_state(name):
                    kind = type(value).__name__
                    return f"{name} in its state_dict is a {kind}, not a tensor; quantize modules after training"
                if fault := plain_fault(value, name):
                    return f"{fault}; a checkpoint holds tensors and plain values (numbers, texts, lists, dicts) only"
            model.load_state_dict(state)
    except Exception as error:  # the user's own code
        return (
            f"its state_dict cannot be saved and loaded again: {type(error).__name__}: {' '.join(str(error).split())}"
        )
    return None
