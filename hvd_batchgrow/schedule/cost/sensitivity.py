"""How the cost of a plan changes if a figure of the machine is halved or doubled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from hvd_batchgrow.schedule.cost.cost import Cost, cost_by
from hvd_batchgrow.schedule.cost.cost_file import CostFile, Times, times_of
from hvd_batchgrow.schedule.cost.step_time import StepTime
from hvd_batchgrow.schedule.plan import Plan

FACTORS = (0.5, 2.0)

_SCALED: dict[str, Callable[[StepTime, float], StepTime]] = {
    "compute speed": lambda t, k: replace(t, pass_s=t.pass_s / k, sample_s=t.sample_s / k, fixed_s=t.fixed_s / k),
    "bandwidth": lambda t, k: replace(t, sync_s_per_byte=t.sync_s_per_byte / k),
    "latency": lambda t, k: replace(t, sync_s=k * t.sync_s),
}
"""Functions that return the step-time model with k times a figure. Bandwidth and latency are those of all links."""


@dataclass(frozen=True)
class Variation:
    """The cost of a plan with one figure changed; the ranks of its phases stay the same."""

    figure: str
    factor: float
    seconds: float
    chain_rank_hours: float
    held_rank_hours: float
    time_ratio: float
    """`seconds`, relative to the plan with the figures of the file."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def sensitivity(plan: Plan, figures: CostFile) -> tuple[Variation, ...]:
    """Return the cost of a plan with each figure halved and doubled.

    Raises:
        JobError: like `predict`.
    """
    times = times_of(plan.job, figures)
    seconds = cost_by(plan, times).seconds
    return tuple(
        _variation(figure, factor, cost_by(plan, _Scaled(times, figure, factor)), seconds)
        for figure in _SCALED
        for factor in FACTORS
    )


def _variation(figure: str, factor: float, cost: Cost, seconds: float) -> Variation:
    ratio = cost.seconds / seconds if seconds else 1.0
    return Variation(figure, factor, cost.seconds, cost.chain_rank_hours, cost.held_rank_hours, ratio)


class _Scaled:
    """Times with one figure changed."""

    def __init__(self, times: Times, figure: str, factor: float) -> None:
        self.gradient_bytes, self.origin = times.gradient_bytes, times.origin
        self._times, self._change, self._factor = times, _SCALED[figure], factor

    @property
    def summing_ranks(self) -> tuple[int, ...]:
        return self._times.summing_ranks

    def at(self, ranks: int) -> StepTime:
        return self._change(self._times.at(ranks), self._factor)
