"""The plan: a job compiled for a number of ranks. `plan` prints it and `train` runs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import BoundaryBase, MeasuredSchedule
from hvd_batchgrow.errors import Fault, JobError
from hvd_batchgrow.schedule.decisions import Decision
from hvd_batchgrow.schedule.growth import measured_stages
from hvd_batchgrow.schedule.layout import Layout, form_layout, ranks_for_full_passes
from hvd_batchgrow.schedule.noise import NoiseScale
from hvd_batchgrow.schedule.phases import Phase, Schedule, Warmup, compile_schedule
from hvd_batchgrow.schedule.policies import (
    POLICIES,
    Stage,
    Start,
    apply_lr_rule,
    batch_cap,
    batch_unit,
    first_batch,
    make_start,
)
from hvd_batchgrow.schedule.trigger_faults import one_gradient, trigger_faults

ChooseRanks = Callable[[Stage], int]
"""Ranks for a stage's batch."""


_MOST_SAMPLES = 2**62
"""Of a run: sample counters are int64, and a batch may go beyond the end."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided before it starts."""

    job: Job
    num_samples: int
    schedule: Schedule
    layouts: tuple[Layout, ...]
    """One per phase."""
    noise: NoiseScale
    num_ranks: int
    """Ranks that can be had."""
    decisions: tuple[Decision, ...] = ()
    """Of a trigger; the schedule is what it is after these, and may change."""

    @property
    def group(self) -> int:
        """γ: samples of one group of the stream."""
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
        """Ranks of the update that starts at a sample counter, and the counter up to which they stay the same."""
        first = self.schedule.index_at(samples)
        ranks = self.layouts[first].ranks
        until = self.schedule.end_samples
        for phase, layout in zip(self.schedule.phases[first:], self.layouts[first:], strict=True):
            if phase.num_updates and layout.ranks != ranks:
                until = phase.start_samples
                break
        return ranks, until

    def noise_scale(self, phase: Phase) -> float:
        """Noise scale g of a phase."""
        return self.noise.of(phase.lr, phase.momentum, phase.global_batch)

    @property
    def notes(self) -> list[str]:
        """What the user should know of it before it runs."""
        if not self.job.gradient_noise.measure:
            return []
        phases = zip(self.schedule.phases, self.layouts, strict=True)
        batches = [p.global_batch for p, layout in phases if p.num_updates and layout.ranks * layout.accumulation == 1]
        told = [str(one_gradient(self.job, batch)) for batch in sorted(set(batches))]
        return [f"gradient_noise.measure: nothing is measured where an update is one pass; {why}" for why in told]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `plan --json` prints them."""
        return {
            "job": self.job.name,
            "num_samples": self.num_samples,
            "num_updates": self.num_updates,
            "end_samples": self.schedule.end_samples,
            "ghost_batch": self.group,
            "warmup_samples": self.schedule.warmup.end_samples,
            "job_file": self.job.model_dump(mode="json", exclude_none=True),
            "phases": [
                self._phase_to_dict(phase, layout)
                for phase, layout in zip(self.schedule.phases, self.layouts, strict=True)
            ],
        }

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
            "ragged": layout.ragged,
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
        ranks: R >= 1, ranks that can be had.
        num_samples: N, size of the training set.
        choose_ranks: decides the ranks of each phase under layout.growth = "auto"; made from measured costs.
        decisions: of the trigger of a measured schedule, those that were made.

    Raises:
        JobError: something cannot be formed; all such faults, with the arithmetic and the nearest valid values.
    """
    faults = _early_faults(job, ranks, num_samples)
    senseless = _first_batch_faults(job, num_samples)
    if senseless:  # no batch can be worked out from these
        raise JobError(faults + senseless, job.name)
    layouts: list[Layout] = []
    faults += trigger_faults(job, ranks, num_samples)
    try:
        start = make_start(job, num_samples)
        stages, epochs = compile_stages(job, start, decisions)
        faults += _batch_faults(stages, job, start)
        layouts = _layouts(stages, job, max(1, ranks), choose_ranks)
    except JobError as error:
        faults += error.faults
    except ArithmeticError as error:
        faults.append(Fault("schedule", f"its numbers leave the range of floating point ({error})"))
    if faults:
        raise JobError(_without_repeats(faults), job.name)
    schedule = compile_schedule(stages, epochs, num_samples, _warmup(job, num_samples))
    return Plan(job, num_samples, schedule, tuple(layouts), start.noise, ranks, tuple(decisions))


def compile_stages(job: Job, start: Start, decisions: Sequence[Decision] = ()) -> tuple[list[Stage], float]:
    """What a job's policy and its trigger want, with its learning-rate rule; and at which epoch it ends.

    Raises JobError.
    """
    try:
        stages, epochs = POLICIES[job.schedule.policy](job.schedule, start), job.schedule.epochs
        if isinstance(job.schedule, MeasuredSchedule):
            stages, epochs = measured_stages(job, start, decisions)
        return apply_lr_rule(stages, job), epochs
    except JobError as error:
        raise JobError(error.faults, job.name) from None


# --- layouts ---------------------------------------------------------------------------------


def _layouts(stages: Sequence[Stage], job: Job, ranks: int, choose_ranks: ChooseRanks | None) -> list[Layout]:
    faults: list[Fault] = []
    layouts = []
    for k, (stage, phase_ranks) in enumerate(zip(stages, _phase_ranks(stages, job, ranks, choose_ranks), strict=True)):
        try:
            layouts.append(layout_for(stage, phase_ranks, job))
        except ValueError as error:
            faults.append(Fault(f"phase {k + 1} (from epoch {stage.start_epoch:g})", str(error)))
    if faults:
        raise JobError(faults, job.name)
    return layouts


def layout_for(stage: Stage, ranks: int, job: Job) -> Layout:
    """A stage's batch on a number of ranks; raises ValueError as `form_layout`."""
    group = job.model.ghost_batch
    return form_layout(stage.global_batch, ranks, group, job.micro_batch_limit, ragged=job.layout.ragged)


def _phase_ranks(stages: Sequence[Stage], job: Job, ranks: int, choose_ranks: ChooseRanks | None) -> list[int]:
    layout, group = job.layout, job.model.ghost_batch
    if layout.growth == "accumulation":
        return [ranks] * len(stages)
    if layout.growth == "auto":
        if choose_ranks is None:
            fault = "'auto' decides by measured costs: plan --cost PROBE.json, which hvd-batchgrow probe writes"
            raise JobError([Fault("layout.growth", fault)])
        return [choose_ranks(stage) for stage in stages]
    if layout.ranks_per_phase is not None:
        if len(layout.ranks_per_phase) != len(stages):
            fault = f"{len(layout.ranks_per_phase)} numbers for {len(stages)} phases; give one for each"
            raise JobError([Fault("layout.ranks_per_phase", fault)])
        return list(layout.ranks_per_phase)
    most = layout.max_ranks or ranks
    return [
        ranks_for_full_passes(stage.global_batch, most, group, job.micro_batch_limit, ragged=layout.ragged)
        for stage in stages
    ]


# --- faults ----------------------------------------------------------------------------------


def _early_faults(job: Job, ranks: int, num_samples: int) -> list[Fault]:
    faults = [] if ranks >= 1 else [Fault("ranks", f"must be at least 1, got {ranks}")]
    section = job.schedule
    if isinstance(section, BoundaryBase):
        epochs = (0.0, *section.boundaries_epochs, section.epochs)
        near = [b for b in sorted(set(section.boundaries_epochs)) if b < section.epochs]
        faults += [
            Fault(
                "schedule.boundaries_epochs",
                f"must rise and end before epochs = {epochs[-1]:g}: {b:g} follows {a:g}; nearest: {near}",
            )
            for a, b in itertools.pairwise(epochs)
            if b <= a
        ]
    if section.epochs * num_samples <= 0.5:
        faults.append(Fault("schedule.epochs", f"{section.epochs:g} of N = {num_samples} samples are none"))
    if section.warmup_epochs >= section.epochs:
        faults.append(
            Fault("schedule.warmup_epochs", f"{section.warmup_epochs:g} leave nothing of epochs = {section.epochs:g}")
        )
    if job.layout.exact and job.update.precision == "float16":
        fault = "'float16' needs a loss scale, which exact sums have no room for; use 'bfloat16' or 'float32'"
        faults.append(Fault("update.precision", fault))
    if job.layout.exact and job.update.compression != "none":
        fault = f"{job.update.compression!r} rounds the sums that layout.exact keeps exact; choose one"
        faults.append(Fault("update.compression", fault))
    if section.warmup_epochs and section.warmup_start_lr > job.optim.lr * section.lr_scale:
        top = job.optim.lr * section.lr_scale
        faults.append(
            Fault("schedule.warmup_start_lr", f"{section.warmup_start_lr:g} is above the learning rate {top:g}")
        )
    return faults


def _first_batch_faults(job: Job, num_samples: int) -> list[Fault]:
    first, unit = first_batch(job), batch_unit(job)
    key = "schedule.batch_steps" if job.schedule.policy == "steps" else "schedule.global_batch"
    faults = []
    if not job.schedule.epochs * num_samples < _MOST_SAMPLES:
        most = f"{_MOST_SAMPLES / num_samples:g}"
        told = f"{job.schedule.epochs:g} of N = {num_samples} samples are more than a sample counter can hold"
        faults.append(Fault("schedule.epochs", f"{told}; nearest: {most}"))
    if first < 1:
        faults.append(Fault(key, f"the first batch must be at least 1, got {first}"))
    if first >= num_samples:
        faults.append(Fault(key, f"{first} is not below N = {num_samples}: no noise would be left to lower"))
    given = getattr(job.schedule, "max_batch", None)
    cap = batch_cap(given, num_samples, unit)
    if cap is not None and cap < first:
        told = f"{given} = {cap}" if isinstance(given, str) else f"{cap}"
        faults.append(
            Fault(
                "schedule.max_batch",
                f"{told} samples of N = {num_samples} is below the first batch {first}; use >= {first}",
            )
        )
    return faults


def _batch_faults(stages: Sequence[Stage], job: Job, start: Start) -> list[Fault]:
    """Batches beyond N/10 that nobody asked for: there the noise stops falling as the leading order says."""
    limit = start.noise.num_samples / 10
    largest = max(stages, key=lambda stage: stage.global_batch)
    stated = getattr(job.schedule, "max_batch", None) is not None or job.schedule.policy in {"steps", "decay"}
    if stated or largest.global_batch <= max(limit, start.global_batch):
        return []
    fault = (
        f"is not set, and from epoch {largest.start_epoch:g} the batch would be {largest.global_batch}, "
        f'beyond N/10 = {limit:g}; set "N/10", or the number that you want'
    )
    return [Fault("schedule.max_batch", fault)]


def _without_repeats(faults: list[Fault]) -> list[Fault]:
    """The same batch in two phases is one fault, told of the first."""
    seen: dict[str, Fault] = {}
    for fault in faults:
        seen.setdefault(fault.message, fault)
    return list(seen.values())


def _warmup(job: Job, num_samples: int) -> Warmup:
    section = job.schedule
    return Warmup(round(section.warmup_epochs * num_samples), section.warmup_start_lr)
