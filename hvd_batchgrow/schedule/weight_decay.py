"""Weight decay per epoch, and `optim.weight_decay_rule`, which keeps it constant when the phase changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.optim import AdamSection, LarsSection, OptimBase
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.stages import Stage


def why_not_per_epoch(optim: OptimBase) -> str | None:
    """Return why `weight_decay_rule = "per_epoch"` is not possible with the optimizer; None: it is."""
    if is_inside_adams_ratio(optim):
        return "'per_epoch' is not defined for adam, which divides weight decay by the gradient's size; use 'adamw'"
    if isinstance(optim, LarsSection):
        return (
            "'per_epoch' is not possible with lars: its trust ratio η ‖w‖/(‖g‖ + β ‖w‖) falls as the weight decay β "
            "rises, so no β that is known in advance holds the decay per epoch; use 'per_update'"
        )
    return None


def is_inside_adams_ratio(optim: OptimBase) -> bool:
    """Return whether the optimizer divides weight decay by the gradient's size, so that it has no rate per epoch."""
    return isinstance(optim, AdamSection) and optim.name == "adam"


def decay_per_sample(optim: OptimBase, stage: Stage) -> float:
    """Return the fraction of a weight that decay removes per sample; not for Adam's, see `is_inside_adams_ratio`.

    λ ε / B for AdamW (Wang & Aitchison 2024, arXiv 2405.13698: the time scale in epochs is B / (N ε λ)), and
    λ ε / ((1-m) B) for SGD and LARS, whose momentum repeats each step 1/(1-m) times; for LARS times the trust ratio.
    """
    memory = 1.0 if isinstance(optim, AdamSection) else 1 - stage.momentum
    return _weight_decay(optim, stage) * stage.lr / (memory * stage.global_batch)


def _weight_decay(optim: OptimBase, stage: Stage) -> float:
    """Return λ; if only groups of parameters have one, that of the group with the strongest."""
    return (optim.weight_decay or strongest_decay(optim)) * _factor(stage)


def _factor(stage: Stage) -> float:
    return 1.0 if stage.weight_decay_factor is None else stage.weight_decay_factor


def strongest_decay(optim: OptimBase) -> float:
    """Return the largest weight decay of a group of parameters, times the group's factor of the learning rate."""
    of_groups = (
        group.lr_scale * (optim.weight_decay if group.weight_decay is None else group.weight_decay)
        for group in optim.groups
    )
    return max(optim.weight_decay, *of_groups, 0.0)


def apply_weight_decay_rule(stages: Sequence[Stage], job: Job) -> list[Stage]:
    """Set the weight decay of each stage so that its decay per epoch is that of the first stage, if the rule says so.

    Raises:
        JobError: the rule is per_epoch, and the optimizer is adam or lars or has weight decay 0; or one update would
            remove a whole weight.
    """
    optim = job.optim
    if optim.weight_decay_rule == "per_update":
        return list(stages)
    if fault := why_not_per_epoch(optim):
        raise JobError([Fault(_KEY, fault)])
    if not strongest_decay(optim):
        raise JobError([Fault(_KEY, "'per_epoch' has no effect without optim.weight_decay above 0")])
    shares = [_share(optim, stage) for stage in stages]
    found = [replace(stage, weight_decay_factor=shares[0] / share) for stage, share in zip(stages, shares, strict=True)]
    for stage in found:
        _refuse_whole_weights(optim, stage)
    return found


_KEY = "optim.weight_decay_rule"


def _share(optim: OptimBase, stage: Stage) -> float:
    """Return the decay per sample at λ = 1."""
    return decay_per_sample(optim.model_copy(update={"weight_decay": 1.0}), stage)


def _refuse_whole_weights(optim: OptimBase, stage: Stage) -> None:
    strongest = strongest_decay(optim)
    decay = strongest * _factor(stage)
    removed = decay * stage.lr
    if removed >= 1:
        key = "optim.weight_decay" if optim.weight_decay == strongest else "weight_decay × lr_scale in optim.groups"
        fault = (
            f"'per_epoch' needs weight decay {decay:.4g} at the batch of {stage.global_batch}; times the learning rate "
            f"{stage.lr:.4g}, each update would remove {removed:.4g} of every weight, which must be below 1; use "
            f"{key} < {strongest / removed:.3g}"
        )
        raise JobError([Fault(_KEY, fault)])
