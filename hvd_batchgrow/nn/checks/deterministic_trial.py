"""Find by trial passes a layer that has no deterministic kernel on its device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from hvd_batchgrow.data.tensor_tree import Tree, num_rows
from hvd_batchgrow.nn.checks.layout_hazards import WHOLE
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.state.forward_state import trial_loss
from hvd_batchgrow.nn.state.side_effect_free import cloned, dry_run, tensors_of


def nondeterministic_layer(model: nn.Module, example: Tree) -> str | None:
    """Check that a network runs under `torch.use_deterministic_algorithms(True)`, which must be set.

    A forward and backward pass in training, and a forward pass in evaluation.

    Args:
        model: maps samples to logits; is not changed.
        example: `forward_state.NUM_SAMPLES` samples on the device.

    Returns:
        The layer's path and class, and torch's name of the operation; None if all operations are deterministic.

    Raises:
        Exception: any other exception of the network.
    """
    running = _Running(model)
    try:
        with dry_run(model, num_rows(example), training=True, gradients=True, num_ghost_batches=2):
            running.when = "in the forward pass"
            loss = trial_loss(model, example)
            running.when = "in the backward pass"
            loss.backward()
            for norm in ghost_norms(model):
                norm.forget()
        with dry_run(model, num_rows(example), training=False):
            running.when = "in evaluation"
            model(cloned(example))
    except RuntimeError as error:
        if not (found := re.match(r"(.+?) does not have a deterministic implementation", str(error))):
            raise
        return f"{running.layer()}: {found[1]}, {running.when}"
    finally:
        running.remove_hooks()
    return None


@contextmanager
def any_kernels() -> Iterator[None]:
    """Allow nondeterministic kernels within the block, where a network is built on the CPU and not trained."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


class _Running:
    """Which module is running in a forward pass, and whose operation in a backward pass.

    An autograd node belongs to the innermost module whose forward made it: each module takes the nodes between its
    inputs and its outputs that no module within it has taken.
    """

    def __init__(self, model: nn.Module) -> None:
        self.when = ""
        self._model = model
        self._forward: list[str] = []
        self._backward: str | None = None
        self._nodes: set[Node] = set()
        self._handles: list[RemovableHandle] = []
        for path, module in model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(partial(self._begin, path), with_kwargs=True),
                module.register_forward_hook(partial(self._end, path)),
            ]

    def layer(self) -> str:
        """Return the path and the class of the module that is running."""
        path = self._forward[-1] if self._forward else self._backward
        if path is None:
            return "the loss"
        return f"{path or WHOLE} ({type(self._model.get_submodule(path)).__name__})"

    def remove_hooks(self) -> None:
        """Remove all hooks from modules and autograd nodes."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, path: str, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._forward:
            self._claim((args, kwargs), self._forward[-1])
        self._forward.append(path)

    def _end(self, path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        self._claim(output, path)
        self._forward.pop()

    def _claim(self, value: Any, path: str) -> None:
        """Hook the nodes that lead to tensors and belong to no module yet."""
        waiting = [tensor.grad_fn for tensor in tensors_of(value)]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self._nodes and node.next_functions:  # other nodes add up gradients
                self._nodes.add(node)
                self._handles.append(node.register_prehook(partial(self._differentiate, path)))
                waiting += [before for before, _ in node.next_functions]

    def _differentiate(self, path: str, _gradients: Any) -> None:
        self._backward = path
        self._forward.clear()  # activation checkpointing may have left a forward early
