"""LARS: a tensor moves by a fraction of its norm, whatever the norm of its gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hvd_batchgrow.nn.parameters import gradient_strides
from hvd_batchgrow.optim.eager import EagerOptimizer
from hvd_batchgrow.optim.tensor_groups import parts_of_size

_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda value: value > 0, "> 0"),
    "momentum": (lambda value: 0 <= value < 1, ">= 0 and < 1"),
    "weight_decay": (lambda value: value >= 0, ">= 0"),
    "trust_coefficient": (lambda value: value > 0, "> 0"),
    "eps": (lambda value: value >= 0, ">= 0"),
}
_CACHE_BYTES = 1 << 20
"""Bytes of parameters that a CPU updates together, so that all calls after the first read them from the cache."""


class Lars(EagerOptimizer):
    """SGD with momentum whose learning rate is scaled tensor by tensor: layer-wise adaptive rate scaling.

    A weight w with gradient ∇ moves by about a fixed fraction of its norm, so that no layer's steps are
    too large for it when batch and learning rate are large:

        λ = η ‖w‖ / (‖∇‖ + β ‖w‖ + eps);  λ = 1 if ‖w‖ or ‖∇‖ is 0
        v ← m (ε/ε') v + ε λ (∇ + β w)
        w ← w - v

    with the learning rate ε, the momentum m, the trust coefficient η, the weight decay β, 2-norms of
    whole tensors in float32 (in float64 for float64) and ε', the learning rate of the last change of v.

    The buffer v includes the learning rate, as in Caffe. It therefore needs the correction ε/ε' on the
    first update after a change (Goyal et al. 2017, §3.2), which is every update of a warm-up. By
    induction, v/ε is then the buffer of torch's form, u ← m u + λ (∇ + β w), w ← w - ε u, which needs no
    correction. Without the correction, past gradients would keep their old learning rates. Each buffer
    stores its ε', also in checkpoints: it may be older for a tensor that had no gradient for a while. If
    ε = 0, as at the start of a warm-up, w stays and v includes a rate of 1 instead.

    Parameters of at most one dimension (biases and norm parameters) get neither λ nor weight decay:
    v ← m (ε/ε') v + ε ∇. A group's key "adapt" replaces this rule for all of its parameters. If it is True,
    they get both; if it is False, they get the group's weight decay without λ: v ← m (ε/ε') v + ε (∇ + β w).
    The caller averages the gradients over the batch, all ranks and micro-batches. No value is copied to
    the host, so `step` does not wait for a GPU.

    Args:
        params: parameters or groups, as for torch's optimizers; not complex.
        lr: ε > 0; a schedule may set a group's to 0 later.
        momentum: m in [0, 1).
        weight_decay: β >= 0.
        trust_coefficient: η > 0.
        eps: >= 0, added to the denominator of λ.

    Raises:
        ValueError: a value is out of its range, or a parameter is complex.

    Source: You, Gitman, Ginsburg 2017, "Large batch training of convolutional networks", arXiv
    1708.03888, algorithm 1. Differences: λ is 1 if a norm is 0; parameters of one dimension are not
    scaled; eps; the correction at a change of ε; and ε comes from the caller, not from a polynomial decay.
    """

    _ratios: Sequence[Tensor] = ()

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "adapt": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with separate values. Raises ValueError as the class does."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: computes gradients and returns the loss, which is then returned.

        Raises:
            ValueError: a gradient is sparse; no parameter has been updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike = [(group, adapt, params) for group in self.param_groups for adapt, params in _alike(group)]
        ratios = [self._update(group, params, adapt=adapt) for group, adapt, params in alike]
        self._ratios = [part for part in ratios if part is not None]
        return loss

    def trust_ratios(self) -> Tensor:
        """Return λ of the tensors that the last update scaled, on the device of the first; empty before an update."""
        if not self._ratios:
            return torch.empty(0)
        return torch.cat([ratios.to(self._ratios[0].device) for ratios in self._ratios])

    def _update(self, group: dict[str, Any], params: list[Tensor], *, adapt: bool) -> Tensor | None:
        """Update parameters of one kind, and return their λ, if they have one."""
        rate = group["lr"] or 1.0  # the rate that the buffers include from now on
        gradients = [_gradient(param) for param in params]
        buffers = self._decayed_buffers(params, group["momentum"], rate)
        ratios = _trust_ratios(params, gradients, group) if adapt else None
        if ratios is not None:
            torch._foreach_addcmul_(buffers, gradients, _factors(ratios * rate, params))
            if group["weight_decay"]:
                torch._foreach_addcmul_(buffers, params, _factors(ratios * (rate * group["weight_decay"]), params))
        else:
            torch._foreach_add_(buffers, gradients, alpha=rate)
            if group["weight_decay"] and group["adapt"] is False:
                torch._foreach_add_(buffers, params, alpha=rate * group["weight_decay"])
        if group["lr"]:
            torch._foreach_sub_(params, buffers)
        return ratios

    def _decayed_buffers(self, params: list[Tensor], momentum: float, rate: float) -> list[Tensor]:
        """Scale each buffer v to m (ε/ε') v in place, and return the buffers. A new buffer has zeros."""
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["buffer_lr"] = rate
        buffers = [state["momentum_buffer"] for state in states]
        torch._foreach_mul_(buffers, [momentum * (rate / state["buffer_lr"]) for state in states])
        for state in states:
            state["buffer_lr"] = rate
        return buffers


def _factors(values: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Return factors for foreach, one for each tensor: on a CPU as numbers, elsewhere spread over each tensor's shape.

    With a list of numbers, foreach would launch one kernel per tensor instead of one for all. The factors need as much
    memory as the tensors, until the next operation.
    """
    if values.device.type == "cpu":
        return list(values.unbind())
    sizes = [param.numel() for param in params]
    numbers = values.to(params[0].dtype).unbind()
    flat = torch.cat([number.expand(size) for number, size in zip(numbers, sizes, strict=True)])
    return [
        part.as_strided(param.shape, gradient_strides(param))
        for part, param in zip(flat.split(sizes), params, strict=True)
    ]


def _trust_ratios(params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    weight, gradient = _norms(params + gradients).view(2, -1)
    denominator = gradient + group["weight_decay"] * weight + group["eps"]
    ratios = group["trust_coefficient"] * weight / denominator
    return torch.where(torch.minimum(weight, gradient) > 0, ratios, 1.0)


def _norms(tensors: list[Tensor]) -> Tensor:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def _alike(group: dict[str, Any]) -> list[tuple[bool, list[Tensor]]]:
    """Return lists of parameters that one call updates together, each with whether λ applies."""
    kinds: dict[tuple[bool, torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for param in group["params"]:
        if param.grad is None:
            continue
        if param.grad.layout is not torch.strided:
            shape = tuple(param.shape)
            raise ValueError(
                f"Lars does not support sparse gradients, got one for a parameter of shape {shape}: make it dense"
            )
        adapt = param.ndim > 1 if group["adapt"] is None else group["adapt"]
        kinds[adapt, param.device, param.dtype].append(param)
    return [
        (adapt, part)
        for (adapt, device, _), params in kinds.items()
        for part in (parts_of_size(params, _CACHE_BYTES) if device.type == "cpu" else [params])
    ]


def _gradient(param: Tensor) -> Tensor:
    gradient = param.grad
    assert gradient is not None
    return gradient


def _check(group: dict[str, Any]) -> None:
    for key, (is_allowed, range_) in _ALLOWED.items():
        value = group[key]
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not is_allowed(value):
            raise ValueError(f"{key} of Lars must be a number {range_}, got {value!r}")
    if group["adapt"] not in (None, True, False):
        raise ValueError(f"adapt of Lars must be True, False or None (more than one dimension), got {group['adapt']!r}")
    for param in group["params"]:
        if param.is_complex():
            raise ValueError(
                f"Lars does not support complex parameters, got one of shape {tuple(param.shape)}, {param.dtype}"
            )


def median_trust_ratio(optimizer: torch.optim.Optimizer) -> float | None:
    """Return the median λ of the last step of `Lars`; None for another optimizer, or before a step."""
    ratios = optimizer.trust_ratios() if isinstance(optimizer, Lars) else torch.empty(0)
    return float(ratios.float().median()) if len(ratios) else None
