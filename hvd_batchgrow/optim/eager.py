"""torch's optimizers without the decorators that import torch.compile, which takes longer than importing torch."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer whose methods are not to be compiled."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(EagerOptimizer, torch.optim.SGD):
    """torch's SGD."""

    step: Any = torch.no_grad()(unwrap(torch.optim.SGD.step))


class Adam(EagerOptimizer, torch.optim.Adam):
    """torch's Adam."""

    step: Any = torch.no_grad()(unwrap(torch.optim.Adam.step))


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """torch's AdamW."""

    step: Any = torch.no_grad()(unwrap(torch.optim.AdamW.step))
