"""Predict a plan's cost from measurements or from a machine's figures, and choose ranks by cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.schedule.cost.cost_file import CostFile, Times, times_of
from hvd_batchgrow.schedule.layout import Layout, fills_nodes, formable_ranks
from hvd_batchgrow.schedule.phases import Phase, compile_schedule
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.schedule.policy import compile_stages
from hvd_batchgrow.schedule.stage_layouts import ChooseRanks, layout_for
from hvd_batchgrow.schedule.stages import Stage, make_start

HOUR_S = 3600.0
_TOLERABLE_MISFIT = 0.1


@dataclass(frozen=True)
class PhaseCost:
    """Cost of a phase."""

    ranks: int
    num_updates: int
    update_s: float
    """Seconds of one update, with its share of the repetitions by `checks.replay_every`."""
    data_wait_share: float | None
    """Fraction of it spent waiting for samples, which a faster data pipeline would save; None: not measured."""
    extrapolated_from: int | None
    """The measured number of ranks from which this is extrapolated; None: not extrapolated."""

    @property
    def seconds(self) -> float:
        """Training time, without start-up, evaluations and checkpoints."""
        return self.num_updates * self.update_s

    @property
    def rank_hours(self) -> float:
        """Rank-hours of the ranks that the phase uses."""
        return self.seconds * self.ranks / HOUR_S


@dataclass(frozen=True)
class Cost:
    """Cost of a plan."""

    phases: tuple[PhaseCost, ...]
    notes: tuple[str, ...]
    """Limits of the prediction."""

    @property
    def seconds(self) -> float:
        """Training time of the whole run."""
        return math.fsum(phase.seconds for phase in self.phases)

    @property
    def peak_ranks(self) -> int:
        """The most ranks of any update."""
        return max(phase.ranks for phase in self.phases if phase.num_updates)

    @property
    def chain_rank_hours(self) -> float:
        """Rank-hours if each phase holds only its own ranks, as in a Slurm chain."""
        return math.fsum(phase.rank_hours for phase in self.phases)

    @property
    def held_rank_hours(self) -> float:
        """Rank-hours if the peak ranks are held throughout, as in one Slurm job."""
        return self.seconds * self.peak_ranks / HOUR_S

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        own = ("seconds", "peak_ranks", "chain_rank_hours", "held_rank_hours")
        phases = [asdict(p) | {"seconds": p.seconds, "rank_hours": p.rank_hours} for p in self.phases]
        return {"phases": phases, **{name: getattr(self, name) for name in own}, "notes": list(self.notes)}


def predict(plan: Plan, figures: CostFile) -> Cost:
    """Return the training cost of a plan, without evaluations, checkpoints and the start-up of each job of a chain.

    Raises:
        JobError: the file does not match the job, or lacks the cost of an all-reduce over this many ranks.
    """
    return cost_by(plan, times_of(plan.job, figures))


def cost_by(plan: Plan, times: Times) -> Cost:
    """Return the training cost of a plan by a step-time model. Raises JobError like `Times.at`."""
    parts = zip(plan.schedule.phases, plan.layouts, strict=True)
    phases = tuple(_phase_cost(phase, layout, plan.job, times) for phase, layout in parts)
    notes = [note for _, _, layout in plan.trained_phases for note in _notes(layout, times)]
    return Cost(phases, tuple(dict.fromkeys([*([times.origin] if times.origin else []), *notes])))


def _phase_cost(phase: Phase, layout: Layout, job: Job, times: Times) -> PhaseCost:
    model, ghost_batch = times.at(layout.ranks), job.model.ghost_batch
    fullest = -(-phase.global_batch // (ghost_batch * layout.ranks)) * ghost_batch
    update_s = model.update_s(fullest, layout, times.gradient_bytes)
    if job.checks.replay_every:
        update_s += model.repeat_s(fullest, layout) / job.checks.replay_every
    extrapolated = model.measured_ranks if model.measured_ranks != layout.ranks else None
    return PhaseCost(layout.ranks, phase.num_updates, update_s, model.data_wait_share, extrapolated)


def _notes(layout: Layout, times: Times) -> Iterable[str]:
    model = times.at(layout.ranks)
    low, high = model.micro_batches
    if model.measured_ranks != layout.ranks:
        counts = ", ".join(map(str, times.summing_ranks))
        sums = f", all-reduces by log2(ranks) from {counts}" if layout.ranks > 1 else ""
        yield f"no measurement on {counted(layout.ranks, 'rank')}: micro-batches as on {model.measured_ranks}{sums}"
    if not low <= layout.micro_batch <= high:
        measured = f"{low} … {high} on {counted(model.measured_ranks, 'rank')}"
        yield f"micro-batch {layout.micro_batch} is outside the measured range: {measured}"
    if model.misfit > _TOLERABLE_MISFIT:
        yield (
            f"the predicted time of an update differs from the measured one by {100 * model.misfit:.0f} % "
            f"({counted(model.measured_ranks, 'rank')}): run probe again on an idle machine"
        )


# --- ranks by cost ---------------------------------------------------------------------------


def choose_ranks(job: Job, num_samples: int, figures: CostFile, ranks: int, ranks_per_node: int = 1) -> ChooseRanks:
    """Return the `choose_ranks` argument of `compile_plan` for layout.grow_by = "auto", by layout.objective.

    least_time chooses the fastest number of ranks that can be formed. least_rank_hours chooses the cheapest. While the
    run exceeds layout.time_limit_h, it upgrades the phase and number of ranks that save the most time per extra
    rank-hour. This follows the lower hull of each phase's (time, rank-hours), so the rank-hours are minimal for the
    resulting time, which may be below the limit by what the last step saved.

    Args:
        job: a job with layout.grow_by = "auto".
        num_samples: N.
        figures: the measurements, or a machine.
        ranks: available ranks; layout.max_ranks may be lower.
        ranks_per_node: every number of ranks must fit on one node or fill whole nodes.

    Returns:
        a function of a stage of this job. It raises JobError if the file does not match the job, or if the time limit
        cannot be met, with the shortest possible time.
    """
    most = min(job.layout.max_ranks or ranks, ranks)

    @cache
    def chosen() -> dict[Stage, int]:
        times = times_of(job, figures)
        stages, _ = compile_stages(job, make_start(job, num_samples))
        phases = compile_schedule(stages, job.schedule.epochs, num_samples).phases
        options = [
            _options(stage, phase, job, times, most, ranks_per_node)
            for stage, phase in zip(stages, phases, strict=True)
        ]
        costs = _by_objective(options, job, ranks)
        return {stage: cost.ranks for stage, cost in zip(stages, costs, strict=True)}

    return lambda stage: chosen()[stage]


def _options(
    stage: Stage, phase: Phase, job: Job, times: Times, max_ranks: int, ranks_per_node: int
) -> list[PhaseCost]:
    """Return the cost of a phase for every number of ranks that can be formed, the fewest first."""
    counts = formable_ranks(
        stage.global_batch // job.model.ghost_batch, max_ranks, uneven_ranks=job.layout.uneven_ranks
    )
    try:
        layouts = [layout_for(stage, ranks, job) for ranks in sorted(counts) if fills_nodes(ranks, ranks_per_node)]
    except ValueError:  # a fault for any number of ranks, which `compile_plan` reports
        return [PhaseCost(1, phase.num_updates, 0.0, None, None)]
    return [_phase_cost(phase, layout, job, times) for layout in layouts]


def _by_objective(options: Sequence[Sequence[PhaseCost]], job: Job, ranks: int) -> list[PhaseCost]:
    layout = job.layout
    limit_s = math.inf if layout.time_limit_h is None else layout.time_limit_h * HOUR_S
    fastest = [min(phase, key=lambda cost: (cost.seconds, cost.ranks)) for phase in options]
    if _total_s(fastest) > limit_s:
        limits = [] if layout.max_ranks is None or layout.max_ranks > ranks else ["layout.max_ranks"]
        limits += [] if layout.max_ranks is not None and layout.max_ranks < ranks else ["--ranks"]
        fault = f"{_too_slow(fastest, limit_s)}, or more ranks ({' and '.join(limits)})"
        raise JobError([Fault("layout.time_limit_h", fault)], job.name)
    if layout.objective == "least_time":
        return fastest
    chosen = [min(phase, key=lambda cost: (_rounded(cost.rank_hours), cost.seconds)) for phase in options]
    while _total_s(chosen) > limit_s:
        k, cost = max(_upgrades(chosen, options), key=lambda upgrade: _worth(chosen[upgrade[0]], upgrade[1]))
        chosen[k] = cost
    return chosen


def _upgrades(chosen: Sequence[PhaseCost], options: Sequence[Sequence[PhaseCost]]) -> Iterable[tuple[int, PhaseCost]]:
    for k, (now, phase) in enumerate(zip(chosen, options, strict=True)):
        yield from ((k, cost) for cost in phase if cost.seconds < now.seconds)


def _worth(now: PhaseCost, then: PhaseCost) -> tuple[float, float]:
    """Return the seconds saved per extra rank-hour; of equals, the smaller step."""
    saved_s = now.seconds - then.seconds
    more = then.rank_hours - now.rank_hours
    return (saved_s / more if more > 0 else math.inf, -saved_s)


def _rounded(rank_hours: float) -> float:
    """Round rank-hours: with perfect scaling they are equal, and floating-point error must not decide."""
    return float(f"{rank_hours:.9g}")


def _total_s(costs: Iterable[PhaseCost]) -> float:
    return math.fsum(cost.seconds for cost in costs)


def _too_slow(fastest: Sequence[PhaseCost], limit_s: float) -> str:
    hours = " + ".join(f"{cost.seconds / HOUR_S:.3g}" for cost in fastest)
    ranks = ", ".join(str(cost.ranks) for cost in fastest)
    total_h = _total_s(fastest) / HOUR_S
    needed_h = math.ceil(total_h * 1000) / 1000
    return (
        f"{limit_s / HOUR_S:g} h cannot be met: the fastest phases, on {ranks} ranks, take {hours} = {total_h:.3g} h; "
        f"set >= {needed_h:g}"
    )
