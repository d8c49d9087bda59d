"""Save, compare and restore everything in a network that a forward or backward pass may change."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has: its parameters, buffers, children, hooks and mode."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
_OPAQUE = (nn.Module, ModuleType, type)
_OF_PYTHON = sys.stdlib_module_names - {"__main__"}
"""Attributes of objects from these modules, such as loggers, are not saved."""


@dataclass(frozen=True)
class Saved:
    """A value and a copy of its content."""

    value: Any
    content: Any = None
    """A clone of a tensor or array, the parts of a container, or the state of a generator; None: nothing is copied."""


class SavedState:
    """A copy of the parameters, buffers and plain attributes of all modules of a network.

    Attributes are numbers, texts, tensors, arrays, generators, and containers and objects of these.

    Args:
        model: uninitialized tensors of lazy modules are skipped.
        parameters: False skips the parameters, to save memory.
    """

    def __init__(self, model: nn.Module, *, parameters: bool = True) -> None:
        self.parameters: dict[str, Saved] = {}
        self.buffers: dict[str, Saved] = {}
        self.attributes: dict[str, Saved] = {}
        self._tensors: list[tuple[dict[str, Any], dict[str, Saved]]] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Saved]]] = []
        seen: set[int] = set()
        for path, module in model.named_modules():
            found = (self.parameters, module._parameters) if parameters else None, (self.buffers, module._buffers)
            for all_of_kind, place in filter(None, found):
                saved = {name: Saved(value, _copy(value)) for name, value in place.items()}
                self._tensors.append((place, saved))
                all_of_kind.update(_under(path, saved))
            own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
            saved = {name: _save(value, seen) for name, value in own.items()}
            self._attributes.append((vars(module), saved))
            self.attributes.update(_under(path, saved))

    @torch.no_grad()
    def restore(self, *, attributes: bool = True) -> None:
        """Restore everything: values that were changed in place, replaced or added.

        Args:
            attributes: False does not restore the plain attributes.
        """
        for place, saved in self._tensors + (self._attributes if attributes else []):
            for name in [name for name in place if name not in saved and name not in _OF_TORCH]:
                del place[name]
            place.update({name: _restore(value) for name, value in saved.items()})


def changed(before: dict[str, Saved], after: dict[str, Saved]) -> list[str]:
    """Return the names of the values that differ, in the order of `after`, then those that only `before` has."""
    gone = [name for name in before if name not in after]
    return [name for name, value in after.items() if name not in before or not _same(before[name], value)] + gone


@contextlib.contextmanager
def kept_state(model: nn.Module) -> Iterator[SavedState]:
    """Restore parameters, buffers and attributes of a network at the end."""
    saved = SavedState(model)
    try:
        yield saved
    finally:
        saved.restore()


def _under(path: str, saved: dict[str, Saved]) -> dict[str, Saved]:
    return {f"{path}.{name}".removeprefix("."): value for name, value in saved.items()}


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None or is_lazy(value) else value.detach().clone()


def _save(value: Any, seen: set[int]) -> Saved:
    return Saved(value, _content(value, seen))


def _content(value: Any, seen: set[int]) -> Any:
    content: Any = None
    if isinstance(value, (*_PLAIN, nn.Parameter)) or id(value) in seen:
        pass
    elif isinstance(value, Tensor):
        content = _copy(value)
    elif isinstance(value, (np.ndarray, set)):
        content = value.copy()
    elif generator := _generator(value):
        content = generator[0]()
    elif (parts := _parts(value)) is not None:
        seen.add(id(value))
        content = {key: part if isinstance(part, _PLAIN) else _save(part, seen) for key, part in parts.items()}
    return content


def _restore(saved: Any) -> Any:
    if not isinstance(saved, Saved):  # a plain part of a container
        return saved
    value, content = saved.value, saved.content
    if content is None:
        return value
    if isinstance(value, Tensor):
        if value.shape != content.shape:
            value.data = content.clone()
        elif not same_tensor(value, content):
            value.copy_(content)
    elif isinstance(value, np.ndarray):
        value[...] = content
    elif generator := _generator(value):
        generator[1](content)
    elif isinstance(value, set):
        value.clear()
        value.update(content)
    else:
        _put_parts(value, {key: _restore(part) for key, part in content.items()})
    return value


def _parts(value: Any) -> dict[Any, Any] | None:
    """Return the parts of a container or the attributes of an object; None for other values."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple, deque)):
        return dict(enumerate(value))
    is_known = type(value).__module__.partition(".")[0] in _OF_PYTHON and not isinstance(value, SimpleNamespace)
    if is_known or not hasattr(value, "__dict__") or callable(value) or isinstance(value, _OPAQUE):
        return None
    return dict(vars(value))


def _put_parts(value: Any, parts: dict[Any, Any]) -> None:
    if isinstance(value, (list, deque)):
        value.clear()
        value.extend(parts.values())
    elif not isinstance(value, tuple):  # a tuple keeps its parts
        place = value if isinstance(value, dict) else vars(value)
        place.clear()
        place.update(parts)


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """Return the functions that get and set the state of a random generator; None for other values."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return (value.get_state, value.set_state) if isinstance(value, np.random.RandomState) else None


def _same(before: Any, after: Any) -> bool:
    """Return whether two values are equal. Objects of unknown kinds always are: each forward may create new ones."""
    before, after = (saved if isinstance(saved, Saved) else Saved(saved) for saved in (before, after))
    ours, theirs = before.content, after.content
    if type(before.value) is not type(after.value):
        return False
    if isinstance(before.value, _PLAIN):
        return before.value is after.value or bool(before.value == after.value)
    if isinstance(ours, Tensor):
        return same_tensor(ours, theirs)
    if isinstance(ours, np.ndarray):
        return ours.dtype == object or np.array_equal(ours, theirs, equal_nan=ours.dtype.kind in "fc")
    if isinstance(ours, dict) and _parts(before.value) is not None:
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    return not isinstance(ours, (tuple, set)) or bool(ours == theirs)  # the state of a Python generator, or a set


def same_tensor(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether shape, type and values are equal, NaN to NaN; on a GPU within rounding, since its sums vary."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if torch.equal(ours, theirs):
        return True
    if not (ours.is_floating_point() or ours.is_complex()):
        return False
    tolerance = 1e-5 if ours.is_cuda else 0.0
    return torch.allclose(ours, theirs, rtol=tolerance, atol=0.0, equal_nan=True)
