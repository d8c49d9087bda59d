"""LARS: a tensor moves by a share of its own size, whatever the size of its gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hvd_batchgrow.optim.tensor_groups import parts_of_size

_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda value: value > 0, "> 0"),
    "momentum": (lambda value: 0 <= value < 1, ">= 0 and < 1"),
    "weight_decay": (lambda value: value >= 0, ">= 0"),
    "trust_coefficient": (lambda value: value > 0, "> 0"),
    "eps": (lambda value: value >= 0, ">= 0"),
}
_CACHE_BYTES = 1 << 20
"""Of parameters that a CPU updates together: what one call has read, the next ones find in the cache."""


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose learning rate is scaled tensor by tensor: layer-wise adaptive rate scaling.

    A weight w with gradient ∇ moves by about a fixed share of its own norm, so that no layer takes
    steps that are large for it when batch and learning rate are large:

        λ = η ‖w‖ / (‖∇‖ + β ‖w‖ + eps),  1 where ‖w‖ or ‖∇‖ is 0
        v ← m (ε/ε') v + ε λ (∇ + β w)
        w ← w - v

    with the learning rate ε, the momentum m, the trust coefficient η, the weight decay β, 2-norms of
    whole tensors in float32 (in float64 for float64) and ε', the rate that v was last made with.

    The buffer v holds the learning rate, as in Caffe: hence the correction ε/ε' on the first update
    after a change (Goyal et al. 2017, §3.2), which is every update of a warm-up. By induction it makes
    v/ε the buffer of torch's form, u ← m u + λ (∇ + β w), w ← w - ε u, which needs none, whatever ε
    does from update to update; left out, past gradients would go on at the rates they came in with.
    ε' is kept with each buffer: it is in the checkpoint, and right for a tensor that had no gradient
    for a while. At ε = 0, where a warm-up may begin, w stays and v holds a rate of 1 instead.

    Parameters of one dimension or none, which are biases and those of norms, get neither λ nor weight
    decay: v ← m (ε/ε') v + ε ∇. A group's key "adapt" replaces this rule for all of its parameters. If it is True,
    they get both; if it is False, they get the group's weight decay without λ: v ← m (ε/ε') v + ε (∇ + β w).
    Gradients must be averaged over the batch before: nothing here knows
    of ranks or passes. No value is read on the host, so that a GPU is not waited for.

    Args:
        params: parameters or groups, as for any of torch's optimisers; not complex.
        lr: ε > 0; a schedule may set a group's to 0 later.
        momentum: m in [0, 1).
        weight_decay: β >= 0.
        trust_coefficient: η > 0.
        eps: >= 0, added to the denominator of λ.

    Raises:
        ValueError: a value is out of its range, or a parameter is complex.

    Source: You, Gitman, Ginsburg 2017, "Large batch training of convolutional networks", arXiv
    1708.03888, algorithm 1. Other than there: λ is 1 where a norm is 0; parameters of one dimension
    are left out; eps; the correction at a change of ε; and ε comes from a schedule,
    where the algorithm has a polynomial decay of its own.
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
        """Add parameters with values of their own; raises ValueError as the class does."""
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
        """Do one update of all parameters that have a gradient.

        Args:
            closure: computes gradients and returns the loss, which is then returned.

        Raises:
            ValueError: a gradient is sparse; nothing has been updated then.
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
        """λ of the tensors that the last update scaled, in their order, on the device of the first; empty before."""
        if not self._ratios:
            return torch.empty(0)
        return torch.cat([ratios.to(self._ratios[0].device) for ratios in self._ratios])

    def _update(self, group: dict[str, Any], params: list[Tensor], *, adapt: bool) -> Tensor | None:
        """One update of parameters of one kind; returns their λ, if they have one."""
        rate = group["lr"] or 1.0  # what the buffers hold from now on
        gradients = [_gradient(param) for param in params]
        buffers = self._decayed_buffers(params, group["momentum"], rate)
        ratios = _trust_ratios(params, gradients, group) if adapt else None
        if ratios is not None:
            torch._foreach_addcmul_(buffers, gradients, (ratios * rate).unbind())
            if group["weight_decay"]:
                torch._foreach_addcmul_(buffers, params, (ratios * (rate * group["weight_decay"])).unbind())
        else:
            torch._foreach_add_(buffers, gradients, alpha=rate)
            if group["weight_decay"] and group["adapt"] is False:
                torch._foreach_add_(buffers, params, alpha=rate * group["weight_decay"])
        if group["lr"]:
            torch._foreach_sub_(params, buffers)
        return ratios

    def _decayed_buffers(self, params: list[Tensor], momentum: float, rate: float) -> list[Tensor]:
        """m (ε/ε') v of each parameter, in place; zeros for one that has no buffer yet."""
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


def _trust_ratios(params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    weight, gradient = _norms(params), _norms(gradients)
    denominator = gradient + group["weight_decay"] * weight + group["eps"]
    ratios = group["trust_coefficient"] * weight / denominator
    return torch.where((weight > 0) & (gradient > 0), ratios, 1.0)


def _norms(tensors: list[Tensor]) -> Tensor:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def _alike(group: dict[str, Any]) -> list[tuple[bool, list[Tensor]]]:
    """Parameters with a gradient in lists that one call works on, and whether λ applies to them."""
    kinds: dict[tuple[bool, torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for param in group["params"]:
        if param.grad is None:
            continue
        if param.grad.layout is not torch.strided:
            shape = tuple(param.shape)
            raise ValueError(f"Lars has no sparse gradients, got one for a parameter of shape {shape}: make it dense")
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
            raise ValueError(f"Lars has no complex parameters, got one of shape {tuple(param.shape)}, {param.dtype}")


def median_trust_ratio(optimizer: torch.optim.Optimizer) -> float | None:
    """Of the last step of `Lars`, over its tensors; None: none was done, or it is another optimiser."""
    ratios = optimizer.trust_ratios() if isinstance(optimizer, Lars) else torch.empty(0)
    return float(ratios.float().median()) if len(ratios) else None
