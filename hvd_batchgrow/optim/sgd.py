"""SGD as a job describes it."""

from __future__ import annotations

import torch
from torch import nn

from hvd_batchgrow.config import OptimSection


def build_sgd(model: nn.Module, optim: OptimSection) -> torch.optim.SGD:
    """torch's SGD, u = m u + g, w -= ε u, with weight decay on weights only.

    Normalisation parameters and biases, which have one dimension or none, are not decayed: found
    by their shape, never by their name. In this form neither a change of ε nor of B under a mean
    gradient asks for a correction of u (Goyal et al. 2017, §3.2, corrects the other form).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        foreach=True,
    )


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Give the next update its learning rate and momentum."""
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = lr, momentum
