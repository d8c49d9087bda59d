"""Check which parameters can be trained, lay them out densely in memory, and choose the type of inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hvd_batchgrow.data.tensor_tree import Tree, map_tensors

_INPUT_TYPES: WeakKeyDictionary[nn.Module, tuple[torch.dtype, torch.dtype]] = WeakKeyDictionary()
"""Of each network, the type of its first parameter, and the type of its inputs that was found then."""


def parameter_faults(model: nn.Module) -> list[str]:
    """Return a line for each parameter that no optimizer here can update; empty if there are no such parameters."""
    parameters = {name: p for name, p in model.named_parameters() if not is_lazy(p)}
    strided = {name: p for name, p in parameters.items() if p.layout == torch.strided}
    return [
        *(f"parameter {name} is {p.layout}; make it dense" for name, p in parameters.items() if name not in strided),
        *(
            f"parameter {name} is {_text(p.dtype)}: complex parameters are not supported; "
            f"keep torch.view_as_real of it as the parameter, and call torch.view_as_complex in the forward"
            for name, p in parameters.items()
            if p.is_complex()
        ),
        *_shared_memory(strided, {name: buffer for name, buffer in model.named_buffers() if not is_lazy(buffer)}),
    ]


def make_dense(model: nn.Module) -> None:
    """Copy each parameter with gaps between its entries, such as a slice that pruning left, to dense memory.

    A dense copy trains bit-identically whether a parameter was a slice or not.
    """
    for parameter in model.parameters():
        if not is_lazy(parameter) and not is_dense(parameter):
            parameter.data = parameter.detach().contiguous()


def is_dense(tensor: Tensor) -> bool:
    """Return whether the entries of a strided tensor fill one piece of memory, each at its own address."""
    # `empty_like` keeps the strides of such a tensor, and of no other.
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def gradient_strides(parameter: Tensor) -> tuple[int, ...]:
    """Return the strides that autograd gives a gradient: those of a dense parameter, else those of C order."""
    return parameter.stride() if is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()


def input_type(model: nn.Module) -> torch.dtype:
    """Return the type that inputs are cast to before the forward.

    It is the type of the floating-point parameters if they all have the same, as torch's layers require. A network
    with several types must cast its inputs itself, and gets float32. Finding it takes milliseconds in a large network.
    So it is found at the first call, and again when the first parameter has another type, as after `model.half()`.
    """
    first = next(model.parameters()).dtype
    if model not in _INPUT_TYPES or _INPUT_TYPES[model][0] != first:
        types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        _INPUT_TYPES[model] = first, types.pop() if len(types) == 1 else torch.float32
    return _INPUT_TYPES[model][1]


def network_inputs(inputs: Tree, model: nn.Module) -> Tree:
    """Return inputs on the device of a model's parameters; floating-point tensors get the type of `input_type`."""
    device, dtype = next(model.parameters()).device, input_type(model)
    return map_tensors(
        lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, non_blocking=True),
        inputs,
    )


def _shared_memory(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a line for parameters that share memory: an optimizer would update an entry more than once."""
    for name, parameter in parameters.items():
        if not is_dense(parameter) and len(_addresses(parameter).unique()) < parameter.numel():
            yield (
                f"parameter {name} {tuple(parameter.shape)} keeps several entries at one address, as expand() makes "
                "them; clone() it before it becomes a parameter"
            )
    # A buffer may be a view of a dense parameter, but not of one that `make_dense` copies.
    sparse = {name for name, parameter in parameters.items() if not is_dense(parameter)}
    stores: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in {**parameters, **buffers}.items():
        if tensor.layout == torch.strided and tensor.numel() and tensor.device.type != "meta":
            stores[tensor.untyped_storage().data_ptr()].append((name, tensor))
    for members in stores.values():
        for (name, tensor), (other_name, other) in combinations(members, 2):
            is_trained = other_name in parameters or name in sparse
            if name in parameters and is_trained and _overlap(tensor, other):
                yield (
                    f"parameter {name} shares memory with {other_name}; clone() one of them, "
                    "or assign the same nn.Parameter in both places to tie them"
                )


def _overlap(tensor: Tensor, other: Tensor) -> bool:
    spans = [(t.data_ptr(), t.data_ptr() + _span_bytes(t)) for t in (tensor, other)]
    if max(start for start, _ in spans) >= min(end for _, end in spans):
        return False
    if tensor.dtype != other.dtype or (is_dense(tensor) and is_dense(other)):
        return True
    return bool(torch.isin(_addresses(tensor), _addresses(other)).any())


def _span_bytes(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _addresses(tensor: Tensor) -> Tensor:
    """Return the index of each entry in the storage: int64 (numel,)."""
    end = int(tensor.storage_offset()) + _span_bytes(tensor) // tensor.element_size()
    return torch.arange(end).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten()


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
