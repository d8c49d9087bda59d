"""The file of `--cost`: measurements of `probe` (PROBE.json), or published figures of a machine (MACHINE.toml)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.cost.machine import Machine, MachineTimes, load_machine
from hvd_batchgrow.schedule.cost.probe_file import Probe, check_probe, load_probe
from hvd_batchgrow.schedule.cost.step_time import StepTime, StepTimes

CostFile = Probe | Machine


class Times(Protocol):
    """The step-time model for every number of ranks."""

    gradient_bytes: int
    """Bytes that an update all-reduces."""
    origin: str | None
    """Where the figures come from, if they were not measured for this job."""

    @property
    def summing_ranks(self) -> tuple[int, ...]:
        """The measured numbers of ranks above 1, from whose all-reduces others are extrapolated."""

    def at(self, ranks: int) -> StepTime:
        """Return the model for a number of ranks. Raises JobError if it is unknown."""


def load_cost_file(path: Path) -> CostFile:
    """Read a machine if the file's name ends with .toml, and otherwise the measurements of `probe`.

    Raises:
        JobError: the machine cannot be read, or has faults.
        RunError: the measurements are missing, damaged, or not a probe.
    """
    return load_machine(path) if path.suffix == ".toml" else load_probe(path)


def times_of(job: Job, figures: CostFile) -> Times:
    """Return the step-time model of a job. Raises JobError if the file is for another job or model."""
    if isinstance(figures, Machine):
        return MachineTimes(figures, job)
    check_probe(job, figures)
    return StepTimes(figures)
