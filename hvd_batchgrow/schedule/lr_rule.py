"""`schedule.lr_rule`: what the learning rate does when the batch has grown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.optim import AdamSection
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.stages import Stage


def apply_lr_rule(stages: Sequence[Stage], job: Job) -> list[Stage]:
    """Multiply the learning rate of each stage by a function of κ, by which the batch has grown since the start.

    κ = B / B₀ of the formed batches. With a rule, the policy has not corrected the learning rate for rounding or limit.

    none: ε; linear: ε κ (Goyal et al. 2017, arXiv 1706.02677); sqrt: ε √κ. adam and adam_linear: ε √κ and eps/√κ
    (Malladi et al. 2022, arXiv 2205.10287), and new βᵢ. adam: βᵢ → βᵢ^κ, which keeps the half-life of the averages
    constant in samples for any κ (Marek et al. 2025, arXiv 2507.07101). adam_linear: 1-βᵢ → κ (1-βᵢ), as
    in Malladi et al., which agrees to first order and needs κ (1-βᵢ) < 1.

    Raises:
        JobError: the rule is for Adam and the optimizer is not, or κ is too large for adam_linear.
    """
    rule = job.schedule.rule
    if rule == "none":
        return list(stages)
    if rule in {"adam", "adam_linear"}:
        return [_adam_set(stage, stages[0].global_batch, job) for stage in stages]
    power = {"linear": 1.0, "sqrt": 0.5}[rule]
    return [replace(s, lr=s.lr * (s.global_batch / stages[0].global_batch) ** power) for s in stages]


def _adam_set(stage: Stage, first: int, job: Job) -> Stage:
    optim, rule = job.optim, job.schedule.rule
    if not isinstance(optim, AdamSection):
        fault = f"{rule!r} is for optim.name = 'adam' or 'adamw', not {optim.name!r}"
        raise JobError([Fault("schedule.lr_rule", fault)])
    kappa = stage.global_batch / first
    if rule == "adam":
        beta1, beta2 = stage.momentum**kappa, optim.betas[1] ** kappa
    else:
        _refuse_large_kappa(stage, first, job, optim)
        beta1, beta2 = 1 - kappa * (1 - stage.momentum), 1 - kappa * (1 - optim.betas[1])
    return replace(stage, lr=stage.lr * kappa**0.5, momentum=beta1, beta2=beta2, eps=optim.eps / kappa**0.5)


def _refuse_large_kappa(stage: Stage, first: int, job: Job, optim: AdamSection) -> None:
    kappa = stage.global_batch / first
    for name, beta in (("β₁", stage.momentum), ("β₂", optim.betas[1])):
        if kappa * (1 - beta) < 1 - 1e-9:
            continue
        unit = job.schedule.batch_unit(job.model.ghost_batch)
        largest = math.floor(first / (1 - beta) * (1 - 1e-9) / unit) * unit
        fault = (
            f"lr_rule = 'adam_linear' needs κ (1-{name}) < 1, but {stage.global_batch}/{first} · {1 - beta:g} = "
            f"{kappa * (1 - beta):g}; use 'adam', or grow to at most {largest}"
        )
        raise JobError([Fault("schedule.lr_rule", fault)])
