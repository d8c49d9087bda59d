"""SGD and LARS of this package, and torch's fused SGD, on all weights of ResNet-50."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.lars import LR, MOMENTUM, WEIGHT_DECAY, contestant, in_groups, random_parameters, resnet50_shapes
from benchmarks.rows.figures import Outcome, compare
from benchmarks.rows.row import Settings
from benchmarks.turns import take_turns
from hvd_batchgrow.config.optim import LarsSection, SgdSection
from hvd_batchgrow.optim.build import build_optimizer

FUSED = "torch SGD, fused"


def run(name: str, settings: Settings) -> Outcome:
    """Time the optimizers in turns."""
    device = torch.device(settings.device)
    shapes = resnet50_shapes()[: 12 if settings.is_tiny else None]

    def ours(section: SgdSection | LarsSection) -> torch.optim.Optimizer:
        return build_optimizer(nn.ParameterList(random_parameters(shapes, device)), section)

    common = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    optimizers = {
        FUSED: torch.optim.SGD(in_groups(random_parameters(shapes, device)), LR, MOMENTUM, fused=True),
        "torch SGD, foreach": torch.optim.SGD(in_groups(random_parameters(shapes, device)), LR, MOMENTUM, foreach=True),
        "hvd_batchgrow SGD": ours(SgdSection.model_validate({"name": "sgd", **common})),
        "hvd_batchgrow LARS": ours(LarsSection.model_validate({"name": "lars", **common})),
    }
    contestants = {label: contestant(optimizer.step, device) for label, optimizer in optimizers.items()}
    rates = take_turns(contestants, settings.turns, settings.is_over())
    return Outcome([compare(f"{len(shapes)} tensors", "updates/s", rates, FUSED)])
