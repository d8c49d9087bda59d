"""The plan: a job compiled for a number of ranks. `plan` prints it and `train` runs it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import AdaptiveSchedule
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.adaptive.batch_requests import adaptive_stages
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.adaptive.trigger_faults import one_gradient, trigger_faults
from hvd_batchgrow.schedule.layout import Layout, form_layout, ranks_for_full_passes
from hvd_batchgrow.schedule.noise import NoiseScale
from hvd_batchgrow.schedule.phases import Phase, Schedule, Warmup, compile_schedule
from hvd_batchgrow.schedule.policies import (
    POLICIES,
    Stage,
    Start,
    apply_lr_rule,
    first_batch,
    make_start,
)
from hvd_batchgrow.schedule.rounding import samples_at
from hvd_batchgrow.schedule.validation.growth_notes import growth_notes
from hvd_batchgrow.schedule.validation.key_checks import batch_faults, key_faults
from hvd_batchgrow.schedule.validation.unlikely_values import unlikely_values

ChooseRanks = Callable[[Stage], int]
"""Returns the number of ranks for a stage's batch."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before it starts."""

    job: Job
    num_samples: int
    schedule: Schedule
    layouts: tuple[Layout, ...]
    """One per phase."""
    noise: NoiseScale
    num_ranks: int
    """Available ranks."""
    decisions: tuple[Decision, ...] = ()
    """Decisions of the trigger so far; the schedule includes them and later ones may change it."""

    @property
    def group(self) -> int:
        """γ: samples of one ghost batch of the stream."""
        return self.job.model.ghost_batch

    @property
    def num_updates(self) -> int:
        """Updates of the whole run."""
        return self.schedule.num_updates

    @property
    def peak_ranks(self) -> int:
        """The most ranks that any phase uses."""
        return max(layout.ranks for layout in self.layouts)

    def ranks_at(self, samples: int) -> tuple[int, int]:
        """Return the ranks of the update that starts at a sample counter, and the counter up to which they stay."""
        first = self.schedule.index_at(samples)
        ranks = self.layouts[first].ranks
        until = self.schedule.end_samples
        for phase, layout in zip(self.schedule.phases[first:], self.layouts[first:], strict=True):
            if phase.num_updates and layout.ranks != ranks:
                until = phase.start_samples
                break
        return ranks, until

    @property
    def notes(self) -> list[str]:
        """Lines that the user should read before the run."""
        num_samples, phases = self.num_samples, self.schedule.phases
        return [
            *([] if self.decisions else growth_notes(self.job, num_samples, phases)),
            *unlikely_values(self.job, num_samples, phases),
            *self._rank_notes(),
            *self._noise_notes(),
        ]

    def noise_scale(self, phase: Phase) -> float:
        """Return the noise scale g of a phase."""
        return self.noise.of(phase.lr, phase.momentum, phase.global_batch)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `plan --json` prints them."""
        return {
            "job": self.job.name,
            "num_samples": self.num_samples,
            "num_updates": self.num_updates,
            "end_samples": self.schedule.end_samples,
            "ghost_batch": self.group,
            "notes": self.notes,
            "warmup_samples": self.schedule.warmup.end_samples,
            "job_file": self.job.model_dump(mode="json", exclude_none=True),
            "phases": [
                self._phase_to_dict(phase, layout)
                for phase, layout in zip(self.schedule.phases, self.layouts, strict=True)
            ],
        }

    def _rank_notes(self) -> list[str]:
        """Return the phases with idle ranks, and what would use the ranks."""
        layout = self.job.layout
        if layout.grow_by != "ranks" or layout.ranks_per_phase:
            return []
        phases = zip(self.schedule.phases, self.layouts, strict=True)
        steps = enumerate(itertools.pairwise(phases), start=2)
        found = [_ranks_lost(k, before.ranks, now.ranks, phase, self) for k, ((_, before), (phase, now)) in steps]
        if layout.max_ranks and layout.max_ranks > self.num_ranks:
            found.append(f"layout.max_ranks = {layout.max_ranks}, but {self.num_ranks} ranks are available (--ranks)")
        return [note for note in found if note]

    def _noise_notes(self) -> list[str]:
        """Return the batches at which the gradient noise cannot be measured."""
        if not self.job.gradient_noise.measure:
            return []
        phases = zip(self.schedule.phases, self.layouts, strict=True)
        batches = [p.global_batch for p, layout in phases if p.num_updates and layout.ranks * layout.accumulation == 1]
        reasons = [str(one_gradient(self.job, batch)) for batch in sorted(set(batches))]
        return [f"gradient_noise.measure: an update of one micro-batch is not measured; {why}" for why in reasons]

    def _phase_to_dict(self, phase: Phase, layout: Layout) -> dict[str, Any]:
        adam = {} if phase.beta2 is None else {"beta2": phase.beta2, "eps": phase.eps}
        return {
            "start_epoch": phase.start_epoch,
            "start_samples": phase.start_samples,
            "num_updates": phase.num_updates,
            "lr": phase.lr,
            "momentum": phase.momentum,
            "global_batch": phase.global_batch,
            "wanted_batch": phase.wanted_batch,
            "ranks": layout.ranks,
            "accumulation": layout.accumulation,
            "micro_batch": layout.micro_batch,
            "uneven_ranks": layout.uneven_ranks,
            "noise_scale": self.noise_scale(phase),
            **({} if phase.progress_rate == 1 else {"progress_rate": phase.progress_rate}),
            **adam,
        }


def compile_plan(
    job: Job,
    ranks: int,
    num_samples: int,
    choose_ranks: ChooseRanks | None = None,
    decisions: Sequence[Decision] = (),
) -> Plan:
    """Compile a job for a number of ranks.

    Args:
        job: the job.
        ranks: R >= 1, available ranks.
        num_samples: N, size of the training set.
        choose_ranks: returns the ranks of each phase for layout.grow_by = "auto", from measured costs.
        decisions: decisions that the trigger of an adaptive schedule has made.

    Raises:
        JobError: something cannot be formed; has all faults, with the arithmetic and the nearest valid values.
    """
    faults = key_faults(job, ranks, num_samples)
    if impossible := batch_faults(job, num_samples):  # the stages cannot be computed from these
        raise JobError(faults + impossible, job.name)
    layouts: list[Layout] = []
    try:
        faults += trigger_faults(job, ranks, num_samples)
        start = make_start(job, num_samples)
        stages, epochs = compile_stages(job, start, decisions)
        if not all(0 < stage.lr < math.inf for stage in stages):
            raise ArithmeticError("a learning rate of 0 or infinity")
        faults += _unlimited_growth(stages, job, start) + _warmup_faults(job, stages[0].lr)
        layouts = _layouts(stages, job, max(1, ranks), choose_ranks)
    except JobError as error:
        faults += error.faults
    except ArithmeticError as error:
        faults.append(Fault("schedule", f"its numbers leave the range of floating point ({error})"))
    if faults:
        raise JobError(_without_repeats(faults), job.name)
    schedule = compile_schedule(stages, epochs, num_samples, _warmup(job, num_samples, stages[0].lr))
    return Plan(job, num_samples, schedule, tuple(layouts), start.noise, ranks, tuple(decisions))


def compile_stages(job: Job, start: Start, decisions: Sequence[Decision] = ()) -> tuple[list[Stage], float]:
    """Return the stages of a job's policy, trigger and learning-rate rule, and the epoch at which it ends.

    Raises JobError.
    """
    try:
        stages, epochs = POLICIES[job.schedule.policy](job.schedule, start), job.schedule.epochs
        if isinstance(job.schedule, AdaptiveSchedule):
            stages, epochs = adaptive_stages(job, start, decisions)
        if start.wanted_batch is not None and stages[0].global_batch == start.global_batch:
            stages = [replace(stages[0], wanted_batch=start.wanted_batch), *stages[1:]]
        return apply_lr_rule(stages, job), epochs
    except JobError as error:
        raise JobError(error.faults, job.name) from None


# --- layouts ---------------------------------------------------------------------------------


def _layouts(stages: Sequence[Stage], job: Job, ranks: int, choose_ranks: ChooseRanks | None) -> list[Layout]:
    faults: list[Fault] = []
    layouts = []
    for k, (stage, phase_ranks) in enumerate(zip(stages, _phase_ranks(stages, job, ranks, choose_ranks), strict=True)):
        if stage.global_batch % job.model.ghost_batch and not job.is_adaptive:
            continue  # the fault of the key is already reported
        try:
            layouts.append(layout_for(stage, phase_ranks, job))
        except ValueError as error:
            faults.append(Fault(f"phase {k + 1} (from epoch {stage.start_epoch:g})", str(error)))
    if faults:
        raise JobError(faults, job.name)
    return layouts


def layout_for(stage: Stage, ranks: int, job: Job) -> Layout:
    """Return the layout of a stage's batch. Raises ValueError as `form_layout` does."""
    group = job.model.ghost_batch
    limit = (
        max(1, job.micro_batch_limit // group) * group
    )  # `key_faults` reports a limit that is not whole ghost batches
    return form_layout(stage.global_batch, ranks, group, limit, uneven_ranks=job.layout.uneven_ranks)


def _phase_ranks(stages: Sequence[Stage], job: Job, ranks: int, choose_ranks: ChooseRanks | None) -> list[int]:
    layout, group = job.layout, job.model.ghost_batch
    if layout.grow_by == "accumulation":
        return [ranks] * len(stages)
    if layout.grow_by == "auto":
        if choose_ranks is None:
            fault = "'auto' needs measured costs: --cost PROBE.json, which hvd-batchgrow probe writes"
            raise JobError([Fault("layout.grow_by", fault)])
        return [choose_ranks(stage) for stage in stages]
    if layout.ranks_per_phase:
        if len(layout.ranks_per_phase) != len(stages):
            fault = f"{len(layout.ranks_per_phase)} numbers for {len(stages)} phases; give one for each phase"
            raise JobError([Fault("layout.ranks_per_phase", fault)])
        return list(layout.ranks_per_phase)
    most = min(layout.max_ranks or ranks, ranks)
    return [
        ranks_for_full_passes(stage.global_batch, most, group, job.micro_batch_limit, uneven_ranks=layout.uneven_ranks)
        for stage in stages
    ]


def _ranks_lost(k: int, before: int, now: int, phase: Phase, plan: Plan) -> str | None:
    """Return a note if a batch is large enough for the ranks of the phase before but not divisible by them."""
    group, batch = plan.group, phase.global_batch
    if now >= before or batch < before * plan.job.micro_batch_limit:
        return None
    lower = batch // (before * group) * before * group
    nearest = f"nearest for {before} ranks: {lower}, {lower + before * group}; or layout.uneven_ranks = true"
    arithmetic = f"batch {batch} = {batch // group} ghost batches of {group}"
    return f"phase {k} has {now} rank{'s' * (now > 1)}, the one before has {before}: {arithmetic}; {nearest}"


# --- faults ----------------------------------------------------------------------------------


def _unlimited_growth(stages: Sequence[Stage], job: Job, start: Start) -> list[Fault]:
    """Return faults for batches above N/10 without a stated limit: there the noise deviates from its leading order.

    This includes a first batch that `lr_scale` or `raise_momentum_to` has enlarged.
    """
    limit, first, policy = start.noise.num_samples / 10, first_batch(job), job.schedule.policy
    largest = max(stages, key=lambda stage: stage.global_batch)
    stated = getattr(job.schedule, "max_batch", None) is not None or policy == "steps"
    if stated or largest.global_batch <= max(limit, first):
        return []
    if policy == "decay":  # only its start can be larger than in the job file
        key = "lr_scale" if job.schedule.lr_scale > 1 else "raise_momentum_to"
        fault = f"enlarges the batch of {first} to {largest.global_batch}, above N/10 = {limit:g}; use less, or "
        return [Fault(f"schedule.{key}", f"{fault}write that as global_batch, with its optim.lr and momentum")]
    fault = (
        f"is not set, and from epoch {largest.start_epoch:g} the batch would be {largest.global_batch}, "
        f'above N/10 = {limit:g}; set "N/10", or the number that you want'
    )
    return [Fault("schedule.max_batch", fault)]


def _without_repeats(faults: list[Fault]) -> list[Fault]:
    """Drop faults that repeat the message of an earlier phase."""
    seen: dict[str, Fault] = {}
    for fault in faults:
        seen.setdefault(fault.message if fault.path.startswith("phase ") else str(fault), fault)
    return list(seen.values())


def _warmup_faults(job: Job, lr: float) -> list[Fault]:
    start_lr = job.schedule.warmup_start_lr
    if not job.schedule.warmup_epochs or start_lr <= lr:
        return []
    return [Fault("schedule.warmup_start_lr", f"{start_lr:g} is above the learning rate {lr:g}; nearest: {lr!r}")]


def _warmup(job: Job, num_samples: int, lr: float) -> Warmup:
    section = job.schedule
    return Warmup(samples_at(section.warmup_epochs, num_samples), section.warmup_start_lr, lr)
