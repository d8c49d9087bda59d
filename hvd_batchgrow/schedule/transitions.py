"""Describe what changes at each phase boundary."""

from __future__ import annotations

import itertools
import math

from hvd_batchgrow.config.optim import AdamSection, LarsSection
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.schedule.weight_decay import decay_per_sample, is_inside_adams_ratio, strongest_decay


def describe_transitions(plan: Plan) -> list[str]:
    """Return one line for each phase after the first."""
    phases = plan.schedule.phases
    return [
        f"{k}. " + "; ".join(_changes(plan, before, after))
        for k, (before, after) in enumerate(itertools.pairwise(phases), start=2)
    ]


def _changes(plan: Plan, before: Phase, after: Phase) -> list[str]:
    return [
        _batch(plan, before, after),
        f"lr {_ratio(after.lr / before.lr)}",
        _momentum(plan, before, after),
        *([_norm_horizon(plan, before, after)] if plan.ghost_batch > 1 else []),  # one sample allows no batch norm
        _weight_decay(plan, before, after),
    ]


def _batch(plan: Plan, before: Phase, after: Phase) -> str:
    text = f"batch {_ratio(after.global_batch / before.global_batch)}"
    if abs(after.wanted_batch - after.global_batch) > 0.5:
        follows_rule = plan.job.schedule.rule != "none"
        lr = "lr follows lr_rule" if follows_rule else "lr makes up for it"
        text += f" (requested {after.wanted_batch:,.6g}, formed {after.global_batch:,}: {lr})"
    return text


def _momentum(plan: Plan, before: Phase, after: Phase) -> str:
    """With a mean gradient, torch's SGD needs no correction when ε or B changes; the buffer of LARS contains ε."""
    optim, same = plan.job.optim, after.momentum == before.momentum
    if isinstance(optim, AdamSection):
        return "Adam's averages kept" if same else f"β₁ → {after.momentum:.4g}"
    changes = []
    if not same:
        changes.append(f"momentum {before.momentum:g} → {after.momentum:g}")
        changes.append(_new_level(plan, before, after, at_once=optim.rescale_momentum))
    if isinstance(optim, LarsSection) and (ratio := _ratio(after.lr / before.lr)) != "held":
        changes.append(f"buffer {ratio} with the lr it holds")
    return ", ".join(changes) or "momentum buffer kept, no correction due"


def _new_level(plan: Plan, before: Phase, after: Phase, *, at_once: bool) -> str:
    if not after.momentum:
        return "buffer cleared"
    if at_once and before.momentum:
        return f"buffer × {(1 - before.momentum) / (1 - after.momentum):.4g}"
    epochs = after.global_batch / (plan.num_samples * (1 - after.momentum))
    return f"buffer refills over B/(N(1-m)) = {epochs:.2g} epochs"


def _norm_horizon(plan: Plan, before: Phase, after: Phase) -> str:
    """The running statistics average over about γ / bn_momentum samples, for any batch."""
    samples = plan.ghost_batch / plan.job.model.bn_momentum
    updates = [samples / phase.global_batch for phase in (before, after)]
    return f"BN memory {samples:,.0f} samples = {updates[0]:.3g} → {updates[1]:.3g} updates"


def _weight_decay(plan: Plan, before: Phase, after: Phase) -> str:
    optim = plan.job.optim
    if not strongest_decay(optim):
        return "no weight decay"
    if is_inside_adams_ratio(optim):
        return "weight decay inside Adam's ratio"
    rates = [plan.num_samples * decay_per_sample(optim, phase) for phase in (before, after)]
    times = " times the trust ratio" if isinstance(optim, LarsSection) else ""
    if math.isclose(*rates, rel_tol=1e-9):
        ratio = _ratio((after.weight_decay_factor or 1.0) / (before.weight_decay_factor or 1.0))
        return f"weight decay {ratio}, per epoch held at {rates[0]:.3g}{times}"
    return f"weight decay per epoch {rates[0]:.3g} → {rates[1]:.3g}{times}"


def _ratio(ratio: float) -> str:
    return "held" if abs(ratio - 1) < 1e-9 else f"× {ratio:.4g}" if ratio > 1 else f"÷ {1 / ratio:.4g}"
