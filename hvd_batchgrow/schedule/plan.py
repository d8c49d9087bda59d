"""The plan: a job compiled for a number of ranks. `plan` prints it and `train` runs it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.errors import Fault, JobError
from hvd_batchgrow.schedule.layout import Layout, form_layout
from hvd_batchgrow.schedule.noise import noise_scale
from hvd_batchgrow.schedule.phases import Phase, Schedule, compile_schedule
from hvd_batchgrow.schedule.policies import POLICIES, batch_cap


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided before it starts."""

    job_name: str
    num_samples: int
    group: int
    """γ: samples of one group of the stream."""
    schedule: Schedule
    layouts: tuple[Layout, ...]
    """One per phase."""

    @property
    def num_updates(self) -> int:
        """Updates of the whole run."""
        return self.schedule.num_updates

    def noise_scale(self, phase: Phase) -> float:
        """Noise scale g of a phase."""
        return noise_scale(phase.lr, phase.momentum, phase.global_batch, self.num_samples)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `plan --json` prints them."""
        return {
            "job": self.job_name,
            "num_samples": self.num_samples,
            "num_updates": self.num_updates,
            "end_samples": self.schedule.end_samples,
            "ghost_batch": self.group,
            "phases": [
                self._phase_to_dict(phase, layout)
                for phase, layout in zip(self.schedule.phases, self.layouts, strict=True)
            ],
        }

    def _phase_to_dict(self, phase: Phase, layout: Layout) -> dict[str, Any]:
        return {
            "start_epoch": phase.start_epoch,
            "start_samples": phase.start_samples,
            "num_updates": phase.num_updates,
            "lr": phase.lr,
            "momentum": phase.momentum,
            "global_batch": phase.global_batch,
            "ranks": layout.ranks,
            "accumulation": layout.accumulation,
            "micro_batch": layout.micro_batch,
            "ragged": layout.ragged,
            "noise_scale": self.noise_scale(phase),
        }


def compile_plan(job: Job, ranks: int, num_samples: int) -> Plan:
    """Compile a job for a number of ranks.

    Args:
        job: the job.
        ranks: R >= 1.
        num_samples: N, size of the training set.

    Raises:
        JobError: something cannot be formed; all such faults, with the arithmetic and the nearest valid values.
    """
    if ranks < 1:
        raise JobError([Fault("ranks", f"must be at least 1, got {ranks}")], job.name)
    faults = _order_faults(job) + _cap_faults(job, num_samples)
    if faults:
        raise JobError(faults, job.name)
    stages = POLICIES[job.schedule.policy](job, num_samples)
    layouts = []
    for k, stage in enumerate(stages):
        try:
            layouts.append(
                form_layout(
                    stage.global_batch,
                    ranks,
                    job.model.ghost_batch,
                    job.layout.max_micro_batch,
                    ragged=job.layout.ragged,
                )
            )
        except ValueError as error:
            faults.append(Fault(f"phase {k + 1} (from epoch {stage.start_epoch:g})", str(error)))
    if faults:
        raise JobError(_without_repeats(faults), job.name)
    schedule = compile_schedule(stages, job.schedule.epochs, num_samples)
    return Plan(job.name, num_samples, job.model.ghost_batch, schedule, tuple(layouts))


def decay_twin(job: Job) -> Job:
    """The run that a growth run must match: the same job, decaying its learning rate at the same boundaries."""
    schedule = job.schedule.model_copy(update={"policy": "decay", "max_batch": None})
    return job.model_copy(update={"name": f"{job.name}-twin", "schedule": schedule})


def _order_faults(job: Job) -> list[Fault]:
    epochs = (0.0, *job.schedule.boundaries_epochs, job.schedule.epochs)
    return [
        Fault(
            "schedule.boundaries_epochs",
            f"must rise and end before epochs = {epochs[-1]:g}: {b:g} follows {a:g}",
        )
        for a, b in itertools.pairwise(epochs)
        if b <= a
    ]


def _cap_faults(job: Job, num_samples: int) -> list[Fault]:
    if job.schedule.policy != "grow":
        return []
    first = job.schedule.global_batch
    cap = batch_cap(job.schedule.max_batch, num_samples, job.model.ghost_batch)
    if cap is None or cap >= first:
        return []
    given = f"{job.schedule.max_batch} = {cap} samples of N = {num_samples}"
    return [Fault("schedule.max_batch", f"{given} is below schedule.global_batch = {first}; use >= {first}")]


def _without_repeats(faults: list[Fault]) -> list[Fault]:
    """The same batch in two phases is one fault, told of the first."""
    seen: dict[str, Fault] = {}
    for fault in faults:
        seen.setdefault(fault.message, fault)
    return list(seen.values())
