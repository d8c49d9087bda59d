"""Kinds of modules that torch accepts and that this package cannot train."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hvd_batchgrow.messages.wording import listed

_WRAPPERS = frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"})
"""Names, not classes: only hvd_batchgrow/comm imports torch.distributed."""


def kind_fault(model: nn.Module) -> str | None:
    """Return why a network or a part of it is of an unsupported kind, and the remedy; None if all are supported.

    Args:
        model: the return value of the user's callable; lazy modules may be uninitialized.
    """
    return next(_module_faults(model), None) or next(_tensor_faults(model), None)


def _module_faults(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        name = path or "the network"
        if isinstance(module, torch.jit.ScriptModule):
            yield (
                f"{name} is a TorchScript module, whose batch norms and dropout cannot be replaced; "
                "return the nn.Module from before torch.jit.script or torch.jit.trace"
            )
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            yield f"{name} is compiled already; return it without torch.compile, and set layout.compile = true"
        if _WRAPPERS & {kind.__name__ for kind in type(module).__mro__}:
            wrapper = type(module).__name__
            yield f"{name} is wrapped in {wrapper}; return the module inside, which all ranks train together"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield from _embedding_faults(name, module)


def _embedding_faults(name: str, table: nn.Embedding | nn.EmbeddingBag) -> Iterator[str]:
    if table.max_norm is not None:
        yield (
            f"{name} has max_norm = {table.max_norm}: its forward pass shortens the rows of its weight, which only the "
            "optimizer may change; build it without max_norm, and divide each row that it looks up by max(1, the row's "
            f"norm / {table.max_norm}) in the network's own forward"
        )
    if table.scale_grad_by_freq:
        yield (
            f"{name} has scale_grad_by_freq = True: the gradient of a token is divided by how often it occurs in a "
            "micro-batch, so that it grows with the number of ranks and micro-batches; build it with "
            "scale_grad_by_freq=False"
        )


def _tensor_faults(model: nn.Module) -> Iterator[str]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if names := [name for name, tensor in tensors.items() if tensor.is_meta]:
        yield f"{listed(names)}: on the meta device, without values; build the network on the CPU"
    if names := [name for name, tensor in tensors.items() if tensor.is_quantized or tensor.layout != torch.strided]:
        yield f"{listed(names)}: quantized or sparse; parameters and buffers must be dense tensors"
    plain = (Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter, nn.UninitializedBuffer)
    if names := [name for name, tensor in tensors.items() if type(tensor.data) not in plain]:
        kind = type(tensors[names[0]].data).__name__
        yield f"{listed(names)}: of class {kind}; parameters and buffers must be plain tensors"
