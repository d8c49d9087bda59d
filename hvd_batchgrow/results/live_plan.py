"""The part of a plan that the live view shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.config.task_specs import Direction
from hvd_batchgrow.results.records import printable, whole
from hvd_batchgrow.results.run_summary import declared_directions, metric_of_job
from hvd_batchgrow.schedule.cost.time_left import PhaseSize


@dataclass(frozen=True)
class LivePlan:
    """A plan of a run, as far as displays show it."""

    name: str
    num_samples: int
    """N."""
    end_samples: int
    num_updates: int
    phases: tuple[PhaseSize, ...]
    micro_batches: tuple[int, ...]
    """Largest micro-batch of each phase."""
    may_grow: bool
    """Whether a trigger may add phases."""
    metric: str
    """Name of the main result."""
    direction: Direction | None
    """How it improves; None: unknown."""
    declares_metric: bool
    """Whether the job names its metrics; those of a user's own task are known after the first evaluation."""

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> LivePlan:
        """Return the plan of plan.json, from `read_plan`, or of `Plan.to_dict`."""
        metric, direction = metric_of_job(tree["job_file"], [])
        phases = tree["phases"]
        return cls(
            name=printable(tree["job"]),
            num_samples=tree["num_samples"],
            end_samples=tree["end_samples"],
            num_updates=tree["num_updates"],
            phases=tuple(
                PhaseSize(
                    start_samples=phase["start_samples"],
                    end_samples=phase["start_samples"] + phase["num_updates"] * phase["global_batch"],
                    global_batch=phase["global_batch"],
                    ranks=whole(phase.get("ranks"), 1, 1),
                )
                for phase in phases
            ),
            micro_batches=tuple(whole(phase.get("micro_batch"), 1, phase["global_batch"]) for phase in phases),
            may_grow=tree["job_file"]["schedule"]["policy"] == "adaptive",
            metric=printable(metric),
            direction=direction,
            declares_metric=declared_directions(tree["job_file"]) is not None,
        )

    def phase_at(self, samples: int) -> int:
        """Return the index of the phase that a sample counter is in; the last one at the end."""
        inside = [
            index for index, phase in enumerate(self.phases) if phase.start_samples <= samples < phase.end_samples
        ]
        return inside[0] if inside else len(self.phases) - 1
