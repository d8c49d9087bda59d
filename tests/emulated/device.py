"""An accelerator whose tensors are in CPU memory, and which counts what a host would wait for.

A tensor on the device `emulated:0` holds a CPU tensor, and every operation on it runs on the CPU's kernels. As on a
GPU,

- an operation on tensors of the device and of the CPU together is an error, except for numbers;
- reading a value (`item`, `tolist`, `cpu`, a boolean index) makes the host wait, as does a copy unless it is
  non-blocking and the host's memory is pinned. Each wait is counted;
- an operation on lists of tensors (`_foreach_…`) is one launch if the tensors at each index are alike, else one per
  tensor. A fused optimizer requires them to be alike;
- autocast casts the inputs of convolutions and matrix products;
- the time between two events can be read once the host has waited for the later one.

Streams, the rounding of a GPU's kernels and speed are not emulated. Lists of so many or so large tensors that a GPU
would need several launches count as one.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map

import hvd_batchgrow
from hvd_batchgrow.nn.parameters import is_dense

NAME = "emulated"
_PACKAGE = f"{Path(hvd_batchgrow.__file__).parent}/"
_WAITING = {"nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "is_nonzero", "bincount"}
"""Operations whose result the host needs, so that it waits."""
_FACTORIES = (
    *("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "zeros", "ones", "full"),
    *("rand", "randn", "scalar_tensor", "eye", "linspace"),
)
"""Operations that make a tensor from numbers."""
_CAST = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "linear"),
    *("matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "addmv"),
)
"""Operations of which autocast casts the inputs."""
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
"""Operations that launch nothing."""


class MixedDevicesError(RuntimeError):
    """An operation on tensors of the device and of the CPU."""


waits: Counter[str] = Counter()
"""How often the host has waited, by line of the package and operation."""
launches: Counter[str] = Counter()
"""Operations that a GPU would launch as kernels, likewise."""


def _line() -> str:
    """Return the innermost line of the package, and its function."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            return f"{path.removeprefix(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _wait(operation: str) -> None:
    waits[f"{_line()}: {operation}"] += 1
    Event.num_waits += 1


def _num_launches(name: str, args: Any) -> int:
    """Return 1, or the number of tensors if foreach cannot take its fast route (ATen/native/ForeachUtils.h).

    Raises:
        RuntimeError: a fused optimizer cannot.
    """
    if not name.startswith(("_foreach_", "_fused_")):
        return 1
    # The last list of a fused Adam counts its steps.
    lists = [arg for arg in args[: 5 if name.startswith("_fused_adam") else None] if isinstance(arg, list) and arg]
    lists = [tensors for tensors in lists if isinstance(tensors[0], Tensor)]
    types = {tensor.dtype for tensors in lists for tensor in tensors}
    has_one_type = len(types) == 1 or name == "_foreach_copy_"
    if has_one_type and all(len({_memory(tensor) for tensor in alike}) == 1 for alike in zip(*lists, strict=True)):
        return 1
    if name.startswith("_fused_"):
        raise RuntimeError(f"{name}: params, grads and states must have the same type, sizes and strides")
    return len(lists[0])


def _memory(tensor: Tensor) -> Any:
    """Return sizes and strides; of an overlapping tensor or one with gaps, something that no other tensor has."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    return (tuple(tensor.shape), tuple(strides)) if is_dense(tensor) else object()


class EmulatedTensor(torch.Tensor):
    """A tensor on the device."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls: type[EmulatedTensor], on_cpu: Tensor) -> EmulatedTensor:
        made: EmulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(NAME, 0),
        )
        made.on_cpu = on_cpu
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _execute(func, args, dict(kwargs or {}))

    def tolist(self) -> Any:
        """Wait, and return the values."""
        _wait("tolist")
        return self.on_cpu.tolist()

    def untyped_storage(self) -> Any:
        """Return the memory that holds the values."""
        return self.on_cpu.untyped_storage()

    def data_ptr(self) -> int:
        """Return the address of the values."""
        return self.on_cpu.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied


def _on_cpu(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.on_cpu if isinstance(leaf, EmulatedTensor) else leaf, value)


def _execute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.partition("::")[2]
    if name == "copy_":
        return _copy(*args, **kwargs)
    if name == "_to_copy":
        return _to_copy(*args, **kwargs)
    leaves = tree_flatten((args, kwargs))[0]
    mine = [leaf for leaf in leaves if isinstance(leaf, EmulatedTensor)]
    _check_mixing(name, func, args, mine, leaves)
    if name in _WAITING or name == "_local_scalar_dense":
        _wait(name)
    elif not _is_view(func) and name not in _FREE:
        launches[f"{_line()}: {name}"] += _num_launches(name, args)
    is_pinned, wanted = kwargs.pop("pin_memory", False), kwargs.get("device")
    if wanted is not None:
        kwargs["device"] = torch.device("cpu")
    result = func(*_on_cpu(args), **_on_cpu(kwargs))
    if name == "_local_scalar_dense":
        return result
    if wanted is not None and torch.device(wanted).type == "cpu":
        result.is_stand_in_for_pinned = is_pinned
        return result
    wrapped = {id(leaf.on_cpu): leaf for leaf in mine}

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return wrapped[id(leaf)] if id(leaf) in wrapped else EmulatedTensor(leaf)

    return tree_map(wrap, result)


def _check_mixing(name: str, func: Any, args: Any, mine: list[EmulatedTensor], leaves: list[Any]) -> None:
    others = [
        leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, EmulatedTensor) and leaf.dim()
    ]
    if name.startswith(("index", "_index_put")):
        for index in args[1] if isinstance(args[1], (list, tuple)) else ():
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                _wait(f"{name} by a boolean")
            if index is not None and not isinstance(index, EmulatedTensor):
                _wait(f"{name} by an index on the CPU")
                others = [other for other in others if other is not index]
    if mine and others:
        raise MixedDevicesError(f"{func} on {NAME}:0 and a CPU tensor of shape {tuple(others[0].shape)}, at {_line()}")


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    to_device, from_device = isinstance(target, EmulatedTensor), isinstance(source, EmulatedTensor)
    if to_device and from_device:
        launches[f"{_line()}: copy_"] += 1
    elif source.dim() or from_device:
        host = source if to_device else target
        if not (non_blocking and getattr(host, "is_stand_in_for_pinned", False)):
            _wait("copy to the device" if to_device else "copy to the host")
    _on_cpu(target).copy_(_on_cpu(source))
    return target


def _to_copy(source: Tensor, **options: Any) -> Tensor:
    non_blocking = options.pop("non_blocking", False)
    device = options.pop("device", None) or source.device
    options = {key: value for key, value in options.items() if value is not None and key in {"dtype", "memory_format"}}
    made = torch.empty_like(_on_cpu(source), **options)
    result = EmulatedTensor(made) if torch.device(device).type == NAME else made
    return _copy(result, source, non_blocking)


class Event:
    """As `torch.cuda.Event`: the time to it is known once the host has waited for it, or for anything later."""

    num_waits = 0
    """Waits for anything, of the whole process."""

    def __init__(self, *, enable_timing: bool) -> None:
        self.seconds, self.num_waits_before = 0.0, 0

    def record(self, stream: None) -> None:
        self.seconds, self.num_waits_before = time.perf_counter(), Event.num_waits

    def synchronize(self) -> None:
        _wait("event")

    def elapsed_time(self, end_event: Event, /) -> float:
        if end_event.num_waits_before == Event.num_waits:
            raise RuntimeError("device not ready")
        return 1e3 * (end_event.seconds - self.seconds)


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.emulated`."""

    Event = Event

    def current_stream(self, device: Any = None) -> None:
        return None

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _pinned(host: Tensor) -> Tensor:
    pinned = host.clone()
    pinned.is_stand_in_for_pinned = True  # type: ignore[attr-defined]
    return pinned


_AUTOCAST = "AutocastPrivateUse1"
_libraries: list[torch.library.Library] = []


def _autocast(operation: Any) -> Any:
    """Return an operation whose inputs are cast to the type of the autocast that is active."""

    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)

        def cast(leaf: Any) -> Any:
            is_cast = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
            return leaf.to(dtype) if is_cast else leaf

        with torch.autocast(NAME, enabled=False):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


@cache
def _register() -> torch.library.Library:
    """Register the device, for the rest of the process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for full in _FACTORIES:
        base, _, overload = full.partition(".")
        library.impl(full, _factory(getattr(getattr(torch.ops.aten, base), overload or "default")), "PrivateUse1")
    for full in _CAST:
        base, _, overload = full.partition(".")
        library.impl(full, _autocast(getattr(getattr(torch.ops.aten, base), overload or "default")), _AUTOCAST)
    _libraries.append(torch.library.Library("_", "IMPL"))
    _libraries[-1].fallback(torch.library.fallthrough_kernel, _AUTOCAST)
    library.impl("_copy_from", lambda source, target, wait=False: _copy(target, source, wait), "PrivateUse1")
    return library


@contextmanager
def emulated_device() -> Iterator[torch.device]:
    """Return the device, which works within the block."""
    _register()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    synchronize = patch.object(torch.accelerator, "synchronize", lambda: _wait("synchronize"))
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # assigning `.data` would lose the subclass
    try:
        # An autograd engine that is running already has no thread for the device.
        in_this_thread = torch.autograd.set_multithreading_enabled(False)
        with patch.object(Tensor, "pin_memory", _pinned), synchronize, in_this_thread:
            yield torch.device(NAME, 0)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def _factory(operation: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        name = operation._schema.name.partition("::")[2]
        if name not in _FREE:
            launches[f"{_line()}: {name}"] += 1
        kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
        return EmulatedTensor(operation(*args, **kwargs))

    return make
