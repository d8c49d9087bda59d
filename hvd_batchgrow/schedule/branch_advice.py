"""Advice from branches: the growth schedule that the critical batches of a run's checkpoints support.

The rules are those of `advice`, with the critical batch in the place of B_simple. A critical batch holds from its
checkpoint to the next one; after the last one it holds to the end of the run. In a run whose noise scale falls, the
critical batch of an earlier checkpoint is a cautious value for later phases, which have less noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hvd_batchgrow.config import GradientNoiseSection, Job
from hvd_batchgrow.config.optim import AdamSection
from hvd_batchgrow.config.schedules import LrRule
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.adaptive.noise_record import Observation
from hvd_batchgrow.schedule.advice import (
    HOLD_EPOCHS,
    growth_cap,
    in_place_of_decay,
    shared_keys,
    without_growth,
)
from hvd_batchgrow.schedule.branches import BranchLrRule
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.policies.steps import StepsSchedule
from hvd_batchgrow.schedule.recorded_run import MIN_FACTOR, RecordedRun
from hvd_batchgrow.schedule.rounding import samples_at
from hvd_batchgrow.schedule.stages import has_normalized_gradients


@dataclass(frozen=True)
class CriticalBatch:
    """What the branches of a checkpoint have shown."""

    samples: int
    """Sample counter of the checkpoint."""
    global_batch: int
    """B of the run there."""
    lr: float
    """ε of the run there."""
    largest: int
    """The largest batch that was tried."""
    critical: int
    """The largest batch that is not worse, together with all smaller ones."""

    @property
    def is_bound(self) -> bool:
        """Whether no branch was worse, so that the critical batch may be larger."""
        return self.critical == self.largest


@dataclass(frozen=True)
class BranchAdvice:
    """A job that grows as far as the branches support it."""

    run: RecordedRun
    found: tuple[CriticalBatch, ...]
    """By ascending samples."""
    lr_rule: BranchLrRule
    """How the learning rate of the branches followed their batch."""
    job: Job
    plan: Plan


def needed_lr_rule(run: RecordedRun) -> BranchLrRule | None:
    """Return the learning-rate rule of branches that stand for growth in place of decay; None: the noise stayed.

    Where the noise scale falls, a larger batch must have the noise scale of the run at the same epoch. It is
    proportional to ε/B, or to ε/√B if gradients are normalized, see `has_normalized_gradients`.
    """
    if not run.noise_fell:
        return None
    return "sqrt" if has_normalized_gradients(run.job) else "linear"


def advise_from_branches(run: RecordedRun, found: Sequence[CriticalBatch], lr_rule: BranchLrRule) -> BranchAdvice:
    """Return the job that the critical batches of a run support.

    Args:
        run: the recorded run; its observations are not used.
        found: at least one, in any order.
        lr_rule: of the branches; `needed_lr_rule`, if that is not None.

    Raises:
        RunError: they support no growth.
        JobError: the advised job cannot be planned.
    """
    found = tuple(sorted(found, key=lambda one: one.samples))
    noise = run.job.gradient_noise
    noise = noise if noise.measure else GradientNoiseSection()
    job = without_growth(run).model_copy(update={"gradient_noise": noise})
    if run.noise_fell:
        job = in_place_of_decay(replace(run, seen=tuple(_observations(run, found))), job, growth_cap(run))
    else:
        job = _in_steps(run, job, found, lr_rule)
    plan = compile_plan(job, run.ranks, run.num_samples)
    if max(phase.global_batch for phase in plan.schedule.phases) < MIN_FACTOR * run.first_batch:
        raise _nothing_supported(run, found)
    return BranchAdvice(run, found, lr_rule, job, plan)


def _observations(run: RecordedRun, found: Sequence[CriticalBatch]) -> Iterator[Observation]:
    """Yield the critical batches as observations of B_simple, one for each phase and checkpoint."""
    end = samples_at(run.job.schedule.epochs, run.num_samples)
    edges = sorted({end, *(one.samples for one in found), *(int(phase["start_samples"]) for phase in run.phases)})
    for a, b in itertools.pairwise(edges):
        known = [one for one in found if one.samples <= a]
        if known:
            batch = float(known[-1].critical)
            yield Observation(a, b, 0, known[-1].global_batch, known[-1].lr, 0, True, batch, batch, batch)


def _in_steps(run: RecordedRun, job: Job, found: Sequence[CriticalBatch], lr_rule: BranchLrRule) -> Job:
    """Return a job that grows at each checkpoint to its critical batch, or to that of a later one if it is smaller."""
    cap, end = growth_cap(run), samples_at(job.schedule.epochs, run.num_samples)
    steps = [(0, run.first_batch)]
    for k, one in enumerate(found):
        at, batch = steps[-1]
        wanted = min(cap, *(later.critical for later in found[k:]))
        new, start = wanted // run.unit * run.unit, at + -(-(one.samples - at) // batch) * batch
        if new >= MIN_FACTOR * batch and start + HOLD_EPOCHS * run.num_samples <= end:
            steps = [*(steps if start else []), (start, new)]
    if steps == [(0, run.first_batch)]:
        raise _nothing_supported(run, found)
    of_adam: LrRule = "adam" if isinstance(run.job.optim, AdamSection) else "sqrt"
    rule: LrRule = of_adam if lr_rule == "sqrt" else lr_rule
    text = " ".join(f"{at}:{batch}" for at, batch in steps)
    schedule = StepsSchedule(policy="steps", batch_steps=text, lr_rule=rule, **shared_keys(run))
    return job.model_copy(update={"schedule": schedule})


def _nothing_supported(run: RecordedRun, found: Sequence[CriticalBatch]) -> RunError:
    seen = ", ".join(f"{one.critical:,} at sample {one.samples:,}" for one in found)
    return RunError(
        f"{run.folder}: no growth is supported: the critical batch was {seen}; the least growth is "
        f"{run.first_batch:,} → {run.least_growth:,} in steps of {run.unit:,}, within N/10 = "
        f"{run.num_samples // 10:,}, and {HOLD_EPOCHS:g} epochs before the end of the run\n"
        "  branch at later checkpoints (--at), or with --tolerance"
    )
