"""Advice: the fixed growth schedule that a run's measured gradient noise supports.

The learning rate is never above the run's own, which the run has shown to train, unless `lr_rule` raises it, or makes
up for a batch that is rounded up. For the noise scale g this means:

- If g fell over the run, because ε decayed or B grew, the advised run has the same g at the same epochs. Growth
  replaces decay as far as B_simple supports it, and ε decays by the remaining factor.
- If g was constant, the batch follows B_simple. With `lr_rule` none, g then falls as B grows, as if ε were divided by
  the same factor; with linear it stays constant.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import LrRule
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.schedule.adaptive.noise_record import (
    Observation,
    more_gradients,
    smaller_pass,
    typical,
    weaknesses,
    where,
)
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.policies.grow import GrowSchedule
from hvd_batchgrow.schedule.policies.seesaw import SeesawSchedule
from hvd_batchgrow.schedule.policies.steps import StepsSchedule
from hvd_batchgrow.schedule.recorded_run import MIN_FACTOR, RecordedRun
from hvd_batchgrow.schedule.rounding import samples_at
from hvd_batchgrow.schedule.stages import has_normalized_gradients
from hvd_batchgrow.schedule.triggers.none import NoTrigger

HOLD_EPOCHS = 0.25
"""Epochs of evidence before a step, and of training after it; the trigger's default."""
BELOW = 0.1
"""Fraction of the samples after a step in which the evidence may be below the batch: one low record is ignored."""


@dataclass(frozen=True)
class AdvisedPhase:
    """A phase of the advised schedule, with the gradient noise recorded in its epochs."""

    phase: Phase
    b_simple: float | None
    """Medians of B_simple and of its band over the samples of the phase; None: no record."""
    low: float | None
    high: float | None
    efficiency: float | None
    """Progress per sample relative to the run, each at the best learning rate for its batch:
    E = (φ + B₀)/(φ + B), φ = B_simple, B₀ the run's batch there. Source: Pollux (OSDI 2021); AdaScale."""


@dataclass(frozen=True)
class Advice:
    """A job that grows as far as the evidence supports, and the quality of the evidence."""

    run: RecordedRun
    job: Job
    plan: Plan
    phases: tuple[AdvisedPhase, ...]
    weak: tuple[str, ...]
    """Where the evidence is weak, in words."""
    headroom: float = 1.0
    """h."""

    @property
    def replaces_decay(self) -> bool:
        """Whether the noise scale follows that of the run where it falls; False: it fell nowhere in the run."""
        return self.job.schedule.policy != "steps"


def supported_steps(
    seen: Sequence[Observation],
    num_samples: int,
    *,
    end_samples: int,
    first_batch: int,
    unit: int,
    cap: int,
    max_batch_factor: float = 2.0,
    headroom: float = 1.0,
) -> list[tuple[int, int]]:
    """Return the sample counters and batches of steps that stay at or below the lower end of B_simple/h.

    The lower end of the band is used because a batch above B_simple wastes samples, while one below it only costs
    updates. A step needs a lower end above the new batch, without a gap, for `HOLD_EPOCHS` since the previous step, and
    in all but a fraction `BELOW` of the later samples. It multiplies the batch by at most `max_batch_factor`.

    Args:
        seen: the observations, in the order of their samples.
        num_samples: N.
        end_samples: end of the advised run; a step within `HOLD_EPOCHS` of it is skipped.
        first_batch: B at sample 0.
        unit: samples of which each batch is a whole multiple.
        cap: the largest batch.
        max_batch_factor: the largest factor of a step.
        headroom: h.

    Returns:
        pairs (sample counter, batch), both rising; the counters are update boundaries.
    """
    steps, hold = [(0, first_batch)], HOLD_EPOCHS * num_samples
    held: list[Observation] = []
    for k, o in enumerate(seen):
        held = [*held, o] if o.is_resolved else []
        at, batch = steps[-1]
        if not held or o.samples - max(held[0].start_samples, at) < hold:
            continue
        window = [h for h in held if h.start_samples >= o.samples - hold - h.length]
        lows = [h.low for h in window if h.low is not None]
        later = typical(seen[k:], lambda s: s.low, BELOW)
        assert later is not None  # this one is resolved
        wanted = min(max_batch_factor * batch, cap, min([*lows, later]) / headroom)
        new, start = int(wanted // unit * unit), at + -(-(o.samples - at) // batch) * batch
        if new >= MIN_FACTOR * batch and start + hold <= end_samples:
            steps.append((start, new))
            held = []
    return steps


def supported_limit(
    seen: Sequence[Observation],
    num_samples: int,
    *,
    wanted: Sequence[tuple[int, float]],
    unit: int,
    cap: int,
    headroom: float = 1.0,
) -> int:
    """Return the largest batch up to which growth can replace decay at every epoch.

    A phase supports the batch that the lower end of B_simple/h reaches in all but a fraction `BELOW` of its samples. A
    phase that is not resolved for `HOLD_EPOCHS`, or for half of its length if it is shorter, supports only the batch
    before it.

    Args:
        seen: the observations, in the order of their samples.
        num_samples: N.
        wanted: for each phase the sample counter of its start, and the batch that keeps the run's noise scale.
        unit: samples of which the limit is a whole multiple, unless it is the first batch.
        cap: the largest allowed batch.
        headroom: h.
    """
    limit, first = cap, round(wanted[0][1])
    ends = [start for start, _ in wanted[1:]] + [max((o.samples for o in seen), default=0)]
    before = first
    for (start, batch), end in zip(wanted, ends, strict=True):
        inside = [o for o in seen if start <= (o.start_samples + o.samples) / 2 < max(start + 1, end)]
        resolved = sum(o.length for o in inside if o.is_resolved)
        enough = resolved > 0 and resolved >= min(HOLD_EPOCHS * num_samples, (end - start) / 2)
        low = typical(inside, lambda o: o.low, BELOW) if enough else None
        supported = before if low is None else max(first, int(low / headroom // unit * unit))
        if batch > max(supported, (low or 0.0) / headroom) * (1 + 1e-9):
            limit = min(limit, supported)
        before = min(limit, max(before, round(batch)))
    return limit


def advise(
    run: RecordedRun, *, max_batch_factor: float = 2.0, headroom: float = 1.0, lr_rule: LrRule | None = None
) -> Advice:
    """Return the job that a run's record supports.

    Args:
        run: the recorded run.
        max_batch_factor: the largest factor of one step, if the run's noise scale was constant.
        headroom: h: batches are at most B_simple/h.
        lr_rule: factor of ε where the batch grows, if the run's noise scale was constant; None: the run's own rule.

    Raises:
        RunError: the evidence is missing or supports no growth; with a remedy.
        JobError: the advised job cannot be planned, or lr_rule contradicts the run.
    """
    _refuse_without_evidence(run)
    job, cap = without_growth(run), growth_cap(run)
    if run.noise_fell:
        if lr_rule not in {None, "none"}:
            fault = f"{lr_rule!r} contradicts the run: its noise scale fell by {run.falls[-1]:.3g}"
            raise JobError([Fault("--lr-rule", f"{fault}, and so does the advised run's")], run.job.name)
        job = in_place_of_decay(run, job, cap, headroom)
    else:
        rule: LrRule = lr_rule or run.job.schedule.rule
        job = _after_b_simple(run, job, cap, max_batch_factor, headroom, rule)
    weak = weaknesses(run.seen, run.job, run.num_samples)
    if place := where(run.seen, run.num_samples, lambda o: not _is_of_plan(o, run)):
        weak.append(f"{place}: recorded with another schedule than the run's plan, for instance before a fork")
    try:
        plan = compile_plan(job, run.ranks, run.num_samples)
    except JobError as error:
        plan = compile_plan(job, 1, run.num_samples)
        weak.append(f"planned for 1 rank, not {run.ranks}: {error.faults[0]}")
    phases = tuple(_beside(phase, run.seen) for phase in plan.schedule.phases if phase.num_updates)
    if max(p.phase.global_batch for p in phases) < MIN_FACTOR * phases[0].phase.global_batch:
        raise _nothing_supported(run, headroom)
    return Advice(run, job, plan, phases, tuple(weak), headroom)


def growth_cap(run: RecordedRun) -> int:
    """Return N/10, up to which the leading order of the noise scale holds, or the run's own limit if lower."""
    own = run.job.schedule.limit(run.num_samples, run.unit)
    tenth = run.num_samples // 10
    return max(run.first_batch, min(tenth, own or tenth) // run.unit * run.unit)


def without_growth(run: RecordedRun) -> Job:
    """Return the run's job without growth. It measures the gradient noise again, so that its growth can be checked.

    Raises:
        RunError: the run is one of AdaScale.
    """
    first, job = run.phases[0], run.job
    if job.trigger.scales_progress:
        fault = "AdaScale sets its learning rate and its length by the gain, which no fixed schedule has"
        remedy = "measure a run without the trigger 'adascale' at its base batch"
        raise RunError(f"{run.folder}: cannot advise on this run: {fault}; {remedy}")
    layout = job.layout.model_copy(update={"ranks_per_phase": None})
    changes = {
        "name": f"{job.name}-advised",
        "optim": job.optim.starting_at(first["lr"], first["momentum"]),
        "trigger": NoTrigger(name="none"),
        "gradient_noise": job.gradient_noise.model_copy(update={"measure": True}),
        "layout": layout.grown_by("accumulation") if layout.grow_by == "auto" else layout,
    }
    return job.model_copy(update=changes)


def shared_keys(run: RecordedRun) -> dict[str, Any]:
    """Return the keys that the advised schedule copies from the run."""
    keys = ("epochs", "warmup_epochs", "warmup_start_lr", "exact_noise")
    return {key: getattr(run.job.schedule, key) for key in keys}


def _after_b_simple(
    run: RecordedRun, job: Job, cap: int, max_batch_factor: float, headroom: float, lr_rule: LrRule
) -> Job:
    steps = supported_steps(
        run.seen,
        run.num_samples,
        end_samples=samples_at(job.schedule.epochs, run.num_samples),
        first_batch=run.first_batch,
        unit=run.unit,
        cap=cap,
        max_batch_factor=max_batch_factor,
        headroom=headroom,
    )
    if len(steps) == 1:
        raise _nothing_supported(run, headroom)
    text = " ".join(f"{at}:{batch}" for at, batch in steps)
    return job.model_copy(
        update={"schedule": StepsSchedule(policy="steps", batch_steps=text, lr_rule=lr_rule, **shared_keys(run))}
    )


def in_place_of_decay(run: RecordedRun, job: Job, cap: int, headroom: float = 1.0) -> Job:
    """Return a job that grows where the run's noise scale fell, as far as the observations support it.

    Args:
        run: the run with its observations.
        job: of `without_growth`.
        cap: the largest allowed batch.
        headroom: h.
    """
    pairs = itertools.pairwise(zip(run.falls, run.phases, strict=True))
    # 12 digits: a fall from 0.2 to 0.04 is by 5, not by 5.000000000000001
    drops = [(b[1]["start_epoch"], float(f"{b[0] / a[0]:.12g}")) for a, b in pairs if b[0] > a[0] * (1 + 1e-9)]
    keys = shared_keys(run) | {
        "global_batch": run.first_batch,
        "boundaries_epochs": tuple(epoch for epoch, _ in drops),
        "noise_factor": tuple(factor for _, factor in drops),
        "batch_multiple": None if run.unit == job.model.ghost_batch else run.unit,
    }

    def limited(max_batch: int) -> Job:
        if has_normalized_gradients(run.job):
            schedule: Any = SeesawSchedule(policy="seesaw", max_batch=max_batch, **keys | {"exact_noise": False})
        else:
            schedule = GrowSchedule(policy="grow", max_batch=max_batch, **keys)
        return job.model_copy(update={"schedule": schedule})

    free = compile_plan(limited(cap), 1, run.num_samples).schedule.phases
    wanted = [(phase.start_samples, phase.wanted_batch) for phase in free]
    return limited(supported_limit(run.seen, run.num_samples, wanted=wanted, unit=run.unit, cap=cap, headroom=headroom))


def _is_of_plan(o: Observation, run: RecordedRun) -> bool:
    """Return whether the plan has a record's batch and, after the warm-up, its learning rate."""
    phase = [p for p in run.phases if p["start_samples"] <= o.start_samples][-1]
    section = run.job.schedule
    longest = section.enlarged_batch / section.first_batch  # with AdaScale, the warm-up counts progress
    is_warm = o.samples > section.warmup_epochs * longest * run.num_samples
    same_lr = math.isclose(o.lr, phase["lr"], rel_tol=1e-6)
    return bool(o.global_batch == phase["global_batch"]) and (same_lr or not is_warm)


def _beside(phase: Phase, seen: Sequence[Observation]) -> AdvisedPhase:
    """Return a phase with the gradient noise recorded in its epochs."""
    inside = [o for o in seen if phase.start_samples <= (o.start_samples + o.samples) / 2 < phase.end_samples]
    known = [(o, o.b_simple) for o in inside if o.b_simple is not None]
    worth = [o.length * (phi + o.global_batch) / (phi + phase.global_batch) for o, phi in known]
    return AdvisedPhase(
        phase,
        typical(inside, lambda o: o.b_simple, 0.5),
        typical(inside, lambda o: o.low, 0.5),
        typical(inside, lambda o: o.high, 0.5),
        sum(worth) / sum(o.length for o, _ in known) if known else None,
    )


def _refuse_without_evidence(run: RecordedRun) -> None:
    """Raise RunError if the evidence is not enough for any schedule."""
    name, measured = run.folder, [o for o in run.seen if o.is_measured]
    if not run.seen:
        raise RunError(f"{name}: nothing is recorded yet; try again after part of an epoch")
    if not measured:
        one = min(o.gradients for o in run.seen) < 2
        hint = "; an update had one gradient, whose noise cannot be measured" if one else ""
        smaller = smaller_pass(run.seen, run.job) if one else None
        if one and not smaller:
            hint += f": {more_gradients(run.seen, run.job)}"
        passes = f" --layout.max-micro-batch {smaller}" if smaller else ""
        command = f"hvd-batchgrow train {shlex.quote(f'{name}/job.toml')} --name {_measured_name(run.job.name)}"
        raise RunError(
            f"{name}: its gradient noise was not measured{hint}\n  train it again, as another run: "
            f"{command} --gradient-noise.measure true{passes}"
        )
    resolved = sum(o.length for o in measured if o.is_resolved) / run.num_samples
    if resolved < HOLD_EPOCHS:
        memory = 2 * run.job.gradient_noise.ema_epochs
        weak = "\n  ".join(weaknesses(run.seen, run.job, run.num_samples))
        raise RunError(
            f"{name}: too weak to advise: B_simple is resolved for {resolved:.2g} epochs, at least {HOLD_EPOCHS:g} are "
            f"needed\n  {weak}\n  train it again with --gradient-noise.ema-epochs {memory:g}; "
            f"{more_gradients(measured, run.job)}; or train for longer"
        )


def _measured_name(name: str) -> str:
    """Return the name of another run that measures: small, small-measured, small-measured2."""
    before = re.fullmatch(r"(.*)-measured(\d*)", name)
    return f"{before[1]}-measured{int(before[2] or 1) + 1}" if before else f"{name}-measured"


def _nothing_supported(run: RecordedRun, headroom: float) -> RunError:
    low, middle, top = (f"{typical(run.seen, lambda o: o.low, share) or 0:,.0f}" for share in (BELOW, 0.5, 1.0))
    least = run.least_growth
    weak = "".join(f"\n  {text}" for text in weaknesses(run.seen, run.job, run.num_samples))
    return RunError(
        f"{run.folder}: no growth is supported: the lower end of B_simple was {low} to {top}, {middle} in the middle; "
        f"for the least growth, {run.first_batch} → {least} in steps of {run.unit}, it must hold "
        f"{headroom * least:,.0f} for {HOLD_EPOCHS:g} epochs, leave as much of the run to grow in, and "
        f"N/10 = {run.num_samples // 10:,} must allow it{weak}"
    )
