"""Updates, samples, time and rank-hours of a run against its plan, by phase and in total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.results.records import number, whole
from hvd_batchgrow.results.run_files import RunFiles


@dataclass(frozen=True)
class PhaseDone:
    """A phase as planned and as trained so far."""

    index: int
    """Its index in the plan."""
    global_batch: int
    planned_updates: int
    updates: int
    samples: int
    seconds: float
    """Of its updates, without evaluations, checkpoints and start-up."""
    rank_hours: float | None
    """Hours of the updates times the ranks that trained them; None: the ranks are not on record."""

    @property
    def planned_samples(self) -> int:
        """Samples that the plan gives the phase."""
        return self.planned_updates * self.global_batch

    @property
    def samples_per_s(self) -> float | None:
        """Samples per second of the updates; None: no update on record."""
        return self.samples / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True)
class Account:
    """Updates, time and rank-hours of a run so far."""

    phases: tuple[PhaseDone, ...]
    invocations: int
    untimed: int
    """Invocations whose duration is not on record: killed before their first evaluation, or of an older version."""
    training_s: float
    """Of the updates on record. Updates that a resumed run had to repeat count once."""
    evaluation_s: float
    branches_s: float
    """Of the pauses in which a trigger's branches were trained."""
    total_s: float | None
    """Sum over the timed invocations, from the start of training to the end, or to the last evaluation if it was
    killed; None: no invocation is timed."""
    rank_hours: float | None
    """Hours of the timed invocations times their ranks, including idle ranks; None: no invocation is timed."""

    @property
    def other_s(self) -> float | None:
        """Checkpoints, start of the pipeline, repeated updates; None: the total is not on record, or is less than the
        time of the updates, some of which were then trained by the origin of a fork or by an untimed invocation."""
        if self.total_s is None:
            return None
        rest = self.total_s - self.training_s - self.evaluation_s - self.branches_s
        return max(0.0, rest) if rest > -0.02 * self.total_s else None  # two clocks, which may differ a little

    def cost(self, price: float) -> float | None:
        """Return the cost at a price per rank-hour; None: no invocation is timed."""
        return None if self.rank_hours is None else self.rank_hours * price

    def to_dict(self, price: float | None = None) -> dict[str, Any]:
        """Return plain values, with the cost if a price is given."""
        return {
            **asdict(self),
            "phases": [asdict(phase) | {"samples_per_s": phase.samples_per_s} for phase in self.phases],
            "other_s": self.other_s,
            **({} if price is None else {"price": price, "cost": self.cost(price)}),
        }


def account_of(run: RunFiles) -> Account:
    """Return what a run has done, from its metrics.jsonl, plan.json and record.json."""
    timed = [attempt for attempt in run.attempts if _seconds(attempt, "elapsed_s") is not None]
    hours = [(_seconds(attempt, "elapsed_s") or 0.0) * whole(attempt.get("ranks"), 1, 1) / 3600 for attempt in timed]
    return Account(
        phases=_phases(run),
        invocations=len(run.attempts),
        untimed=len(run.attempts) - len(timed),
        training_s=float(run.seconds[-1]) if run.train else 0.0,
        evaluation_s=sum(_seconds(attempt, "evaluation_s") or 0.0 for attempt in timed),
        branches_s=sum(_seconds(attempt, "branches_s") or 0.0 for attempt in timed),
        total_s=sum(_seconds(attempt, "elapsed_s") or 0.0 for attempt in timed) if timed else None,
        rank_hours=sum(hours) if timed else None,
    )


def phases_of_records(run: RunFiles) -> NDArray[np.int64]:
    """Return the index of the phase in which each training record begins, by its sample counter.

    Its own index of a phase may be of another plan: that of the origin of a fork, or one before a decision.
    """
    starts = [phase["start_samples"] for phase in run.plan["phases"]]
    return np.searchsorted(starts, run.column("samples") - run.record_samples, side="right") - 1


def _phases(run: RunFiles) -> tuple[PhaseDone, ...]:
    """Return the phases that have updates. A training record counts for the phase in which it begins."""
    phases, of_phase = run.plan["phases"], phases_of_records(run)
    updates, found = np.diff(np.nan_to_num(run.column("updates")), prepend=0.0), []
    for index, phase in enumerate(phases):
        if not phase["num_updates"]:
            continue
        rows = of_phase == index
        found.append(
            PhaseDone(
                index=index,
                global_batch=phase["global_batch"],
                planned_updates=phase["num_updates"],
                updates=round(float(updates[rows].sum())),
                samples=round(float(run.record_samples[rows].sum())),
                seconds=float(run.record_seconds[rows].sum()),
                rank_hours=number(float(run.rank_hours[rows].sum())),
            )
        )
    return tuple(found)


def _seconds(attempt: Mapping[str, Any], key: str) -> float | None:
    value = number(attempt.get(key))
    return value if value is not None and value >= 0 else None
