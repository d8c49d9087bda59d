"""The decay twin: the run that a growth run must match."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hvd_batchgrow.config import GradientNoiseSection, Job
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.layout import formable_ranks
from hvd_batchgrow.schedule.noise import NoiseScale
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.policies.decay import DecaySchedule
from hvd_batchgrow.schedule.policy import compile_stages, policy_of
from hvd_batchgrow.schedule.stages import Stage, Start, make_start
from hvd_batchgrow.schedule.triggers.none import NoTrigger
from hvd_batchgrow.schedule.weight_decay import (
    decay_per_sample,
    is_inside_adams_ratio,
    strongest_decay,
    why_not_per_epoch,
)


def decay_twin(job: Job, num_samples: int, decisions: Sequence[Decision] = ()) -> Job:
    """Return the job with the same noise scale at the same epochs, by decay of the learning rate alone.

    The twin starts from the job's own learning rate, momentum and batch, before `lr_scale` and `raise_momentum_to`. For
    an imported schedule it starts from the learning rate with the noise scale of the first phase. It warms up from the
    same fraction of its learning rate. If the job does not state factors and boundaries, the twin's factors are
    those of the job's phases. The twin of an adaptive schedule decays where the batch has grown, by the same factor.
    The twin of AdaScale is the schedule that AdaScale scales.

    Raises:
        JobError: the job cannot be planned, its noise scale rises somewhere, or it is adaptive and has no decisions
            yet.
    """
    section, start = job.schedule, make_start(job, num_samples)
    stated = policy_of(job).stated_decay(job)
    if job.is_adaptive and stated is None and not decisions:
        fault = "'adaptive' has a twin once it has decided: plan JOB --replay RUN/decisions.jsonl --twin"
        raise JobError([Fault("schedule.policy", fault)], job.name)
    stages, _ = compile_stages(job, start, decisions)
    boundaries, factor = stated or _decays(job, start.noise_after_rule, stages)
    first = stages[0]
    lr = job.optim.lr * _first_multiple(start, first)
    twin = DecaySchedule(
        policy="decay",
        epochs=section.epochs,
        global_batch=section.first_batch,
        boundaries_epochs=boundaries,
        noise_factor=factor if boundaries else 1.0,
        warmup_epochs=section.warmup_epochs,
        warmup_start_lr=lr * (section.warmup_start_lr / first.lr),
        exact_noise=section.exact_noise,
    )
    layout = job.layout.grown_by("accumulation")
    noise = job.gradient_noise  # without a trigger, which may have measured it
    noise = noise if noise.measure else GradientNoiseSection()
    optim = job.optim.starting_at(lr, job.optim.momentum)
    changes = {"name": f"{job.name}-twin", "optim": optim, "schedule": twin, "layout": layout}
    return job.model_copy(update={**changes, "trigger": NoTrigger(name="none"), "gradient_noise": noise})


def _first_multiple(start: Start, first: Stage) -> float:
    """Return the ratio of the first phase's noise scale, which an imported schedule lowers, to that of the start."""
    if (first.lr, first.global_batch) == (start.lr, start.global_batch):
        return 1.0
    return start.noise.of(first.lr, first.momentum, first.global_batch) / start.first_noise


def _decays(
    job: Job, noise: NoiseScale, stages: Sequence[Stage]
) -> tuple[tuple[float, ...], float | tuple[float, ...]]:
    """Return the epochs at which the noise scale falls, and the factors. Raises JobError if it rises."""
    scales = [noise.of(stage.lr, stage.momentum, stage.global_batch) for stage in stages]
    factors = [a / b for a, b in itertools.pairwise(scales)]
    if rises := [k for k, factor in enumerate(factors, start=1) if factor < 1 - 1e-9]:
        k = rises[0]
        fault = f"no decaying twin: the noise scale rises from {scales[k - 1]:.4g} to {scales[k]:.4g} at epoch "
        fault += f"{stages[k].start_epoch:g}, and a run that only decays the learning rate cannot match that"
        raise JobError([Fault("schedule", fault)], job.name)
    return tuple(stage.start_epoch for stage in stages[1:]), tuple(max(1.0, f) for f in factors)


def compile_twin(twin: Job, ranks: int, num_samples: int) -> Plan:
    """Return a twin's plan on at most `ranks` ranks: its batch never grows and may be too small for all of them.

    Raises:
        JobError: it cannot be formed on any number of ranks.
    """
    groups = twin.schedule.first_batch // twin.model.ghost_batch
    return compile_plan(twin, next(formable_ranks(groups, ranks, uneven_ranks=twin.layout.uneven_ranks)), num_samples)


def weight_decay_note(plan: Plan, twin: Plan) -> str | None:
    """Return a note if weight decay per epoch differs between a run and its twin, which confounds them."""
    optim = plan.job.optim
    if not strongest_decay(optim) or is_inside_adams_ratio(optim):
        return None
    for phase in plan.schedule.phases:
        middle = (phase.start_samples + phase.end_samples) // 2  # both have passed the boundary by then
        if not phase.num_updates or middle >= twin.schedule.end_samples:
            continue
        of_twin = twin.schedule.phases[twin.schedule.index_at(middle)]
        ours, its = (plan.num_samples * decay_per_sample(optim, each) for each in (phase, of_twin))
        if not math.isclose(ours, its, rel_tol=_SAME_DECAY):
            epoch = phase.start_samples / plan.num_samples
            found = f"{ours:.3g} and {its:.3g} per epoch from epoch {epoch:.4g} on"
            may_help = phase.start_samples and optim.weight_decay_rule == "per_update" and not why_not_per_epoch(optim)
            remedy = '; optim.weight_decay_rule = "per_epoch" makes them equal' if may_help else ""
            return f"run and twin also differ in weight decay: {found}{remedy}"
    return None


_SAME_DECAY = 0.15
"""Largest relative difference that counts as equal: at B = N/10 the exact noise scale is 10 % below εN/(B(1-m))."""
