"""Record the part of each ghost batch, or of each sample, in the gradients of the norm layers of a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, ghost_norms
from hvd_batchgrow.nn.modes import kept_modes

_OF_SAMPLES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Norms that compute the output for a sample from that sample alone."""


class NormGradients:
    """The gradients of the weights and biases of norm layers, for each unit of a micro-batch.

    For y = w x̂ + b, unit i contributes Σ dy x̂ and Σ dy over its samples and pixels. A unit is a part of the update
    whose loss depends on no other part: a ghost batch if the network has ghost norms, else a sample. A ghost norm
    computes these sums in its backward anyway. For LayerNorm, GroupNorm and RMSNorm they are computed from input and
    gradient.

    Other norms, subclasses with their own forward, and norms without trained parameters are not recorded.

    Args:
        model: gets hooks, which record only between `begin` and `end`.
        mixes_samples: whether the inputs of a sample depend on other samples of its ghost batch, as with Mixup.

    Raises:
        ValueError: the network has no norm that can be recorded, or batch norms that are not ghost norms.
    """

    def __init__(self, model: nn.Module, *, mixes_samples: bool = False) -> None:
        ghosts = [norm for norm in ghost_norms(model) if not norm.frozen]
        others = [module for module in model.modules() if _is_of_samples(module)]
        self.names = {p: name for name, p in model.named_parameters()}
        self.parameters = list(dict.fromkeys(p for norm in (*ghosts, *others) for p in _trained(norm)))
        self.other_kinds = sorted({type(module).__name__ for module in others})
        """Classes of the recorded norms that are not ghost norms."""
        self.unit: Literal["ghost batch", "sample"] = "ghost batch" if ghosts or mixes_samples else "sample"
        _check(model, self)
        self._num_samples = self._num_ghost_batches = 0
        """Of the micro-batch that is recorded; 0: nothing is recorded."""
        self._is_one = False
        """Whether the micro-batch is a single unit."""
        self._parts: dict[nn.Parameter, list[Tensor]] = defaultdict(list)
        """Gradients of units, (units, n), one for each use of the parameter."""
        self._wholes: dict[nn.Parameter, list[Tensor]] = defaultdict(list)
        """Gradients of all samples together."""
        self._ghosts = ghosts
        self._handles: list[RemovableHandle] = []
        for ghost in ghosts:
            self._observe(ghost)
        for module in others:
            self._handles.append(module.register_forward_hook(self._after_forward(), with_kwargs=True))
        for parameter in self.parameters:
            self._handles.append(parameter.register_hook(self._keep_whole(parameter)))

    def begin(self, num_samples: int, num_ghost_batches: int) -> None:
        """Record the next forward and backward pass, over samples that are whole ghost batches."""
        self._num_samples, self._num_ghost_batches = num_samples, num_ghost_batches
        self._is_one = self.unit == "ghost batch" and num_ghost_batches == 1
        self._parts.clear()
        self._wholes.clear()

    def end(self) -> dict[nn.Parameter, Tensor]:
        """Return the gradients of the units, (units, n), of each parameter that the backward pass has reached.

        Raises:
            ValueError: a parameter has a gradient from elsewhere than its norm.
        """
        self._num_samples = 0
        if not self._is_one and (names := [self.names[p] for p in self._wholes if p not in self._parts]):
            raise ValueError(f"{names[0]}: its norm was not in training mode, so gradient_noise cannot measure it")
        found = self._wholes if self._is_one else self._parts
        return {p: sum(parts[1:], parts[0]).reshape(-1, p.numel()) for p, parts in found.items()}

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        for ghost in self._ghosts:
            ghost.keep_sums = None

    # Copies of a module share plain functions, but copy the object of a bound method: so all hooks are functions.

    def _observe(self, ghost: GhostBatchNorm) -> None:
        def keep(sums: Tensor) -> None:
            if self._num_samples:
                self._keep((ghost.weight, ghost.bias), (sums[:, 0], sums[:, 1]))

        ghost.keep_sums = keep

    def _after_forward(self) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if self._num_samples and not self._is_one and output.requires_grad:
                (x,) = (*args, *kwargs.values())
                output.register_hook(lambda grad: self._keep_samples(module, x, grad))

        return after

    def _keep_whole(self, parameter: nn.Parameter) -> Any:
        def keep(gradient: Tensor) -> None:
            if self._num_samples:
                self._wholes[parameter].append(gradient)

        return keep

    def _keep_samples(self, norm: nn.Module, x: Tensor, grad: Tensor) -> None:
        if len(x) != self._num_samples:
            raise ValueError(
                f"a {type(norm).__name__} has an input of shape {tuple(x.shape)} for {self._num_samples} samples; "
                "to measure gradient noise from it, it needs one row per sample"
            )
        sums = gradients_of_samples(norm, x.detach(), grad)
        if self.unit == "ghost batch":
            sums = [part.view(self._num_ghost_batches, -1, part.shape[1]).sum(1) for part in sums]
        self._keep((norm.weight, getattr(norm, "bias", None)), sums)

    def _keep(self, parameters: Any, gradients: Any) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter is not None and parameter.requires_grad:
                self._parts[parameter].append(gradient)


@torch.no_grad()
def gradients_of_samples(norm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Return Σ dy x̂ and Σ dy over the pixels or tokens of each sample, in float32 or wider: (samples, n) each.

    Args:
        norm: one of `_OF_SAMPLES`.
        x: its input, with a row for each sample.
        grad: dy, the gradient of its output.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, grad = x.to(wide), grad.to(wide)
    if isinstance(norm, nn.GroupNorm):
        normal, inner = functional.group_norm(x, norm.num_groups, eps=norm.eps), range(2, x.dim())
    else:
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        normalize: Any = functional.layer_norm if isinstance(norm, nn.LayerNorm) else functional.rms_norm
        normal, inner = (
            normalize(x, norm.normalized_shape, eps=norm.eps),
            range(1, x.dim() - len(norm.normalized_shape)),
        )
    return [(part.sum(tuple(inner)) if inner else part).flatten(1) for part in (grad * normal, grad)]


def _check(model: nn.Module, recorder: NormGradients) -> None:
    if plain := list(_batch_norms(model)):
        raise ValueError(
            f"{plain[0]} is a torch batch norm, in which the samples of a micro-batch affect each other; convert it to "
            "a ghost norm (convert_ghost_batch_norm)"
        )
    if not recorder.parameters:
        kinds = ", ".join(("GhostBatchNorm", *(kind.__name__ for kind in _OF_SAMPLES)))
        raise ValueError(f"the network has no norm layer with a trained weight or bias ({kinds})")
    if getattr(model, "_compiled_call_impl", None) is not None:
        refuse_compiled(recorder)


def refuse_compiled(recorder: NormGradients) -> None:
    """Raise ValueError if a compiled network has norms other than ghost norms to record, whose hooks need Python."""
    if recorder.other_kinds:
        raise ValueError(f"in a compiled network only ghost norms can be measured, not {recorder.other_kinds[0]}")


def _batch_norms(model: nn.Module) -> Iterator[str]:
    """Yield the names of the batch norms that normalize by the statistics of a micro-batch in training."""
    with kept_modes(model):
        model.train()
        for path, module in model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                yield path or "the network"


def _is_of_samples(module: nn.Module) -> bool:
    """Return whether a module is a norm of `_OF_SAMPLES` with the forward of its class and trained parameters."""
    kind = next((kind for kind in _OF_SAMPLES if isinstance(module, kind)), None)
    is_plain = kind is not None and type(module).forward is kind.forward and "forward" not in vars(module)
    return is_plain and any(True for _ in _trained(module))


def _trained(norm: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in norm.parameters(recurse=False) if parameter.requires_grad)
