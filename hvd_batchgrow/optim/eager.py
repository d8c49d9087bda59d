"""torch's optimizers without the decorators that import torch.compile, which takes longer than importing torch.

A state of theirs can be saved on one device and loaded on another, whose implementation is then used.
"""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.optim.implementation import PORTABLE

_state_dict: Any = unwrap(torch.optim.Optimizer.state_dict)
_load_state_dict: Any = unwrap(torch.optim.Optimizer.load_state_dict)


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer whose methods are not to be compiled."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, which does not depend on the implementation."""
        state: dict[str, Any] = _state_dict(self)
        for group in state["param_groups"]:
            group.update({key: value for key, value in PORTABLE.items() if key in group})
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, and keep this optimizer's implementation."""
        own = [{key: group[key] for key in PORTABLE if key in group} for group in self.param_groups]
        own += [{}] * len(state_dict["param_groups"])  # torch reports a wrong number of groups
        groups = [group | options for group, options in zip(state_dict["param_groups"], own, strict=False)]
        _load_state_dict(self, {**state_dict, "param_groups": groups})
        for group in self.param_groups:
            if group.get("fused"):
                for parameter in group["params"]:
                    # `self.state[…]` would make a state for a parameter that no loss has reached.
                    _lay_out(self.state.get(parameter, {}), parameter)


class SGD(EagerOptimizer, torch.optim.SGD):
    """torch's SGD."""

    step: Any = torch.no_grad()(unwrap(torch.optim.SGD.step))

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]
    ) -> bool:
        """Give the fused kernel a buffer for each parameter: it fails if only some of them have one.

        The first step from a buffer of zeros is that of a new buffer.
        """
        for parameter in group["params"] if group["fused"] and group["momentum"] else ():
            if parameter.grad is not None and self.state[parameter].get("momentum_buffer") is None:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return bool(super()._init_group(group, params, grads, buffers))  # type: ignore[no-untyped-call]


class Adam(EagerOptimizer, torch.optim.Adam):
    """torch's Adam."""

    step: Any = torch.no_grad()(unwrap(torch.optim.Adam.step))


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """torch's AdamW."""

    step: Any = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def _lay_out(state: dict[str, Any], parameter: Tensor) -> None:
    """Give the tensors of a state the strides of their parameter, which fused kernels require."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
            state[key] = torch.empty_like(parameter, requires_grad=False).copy_(value)
