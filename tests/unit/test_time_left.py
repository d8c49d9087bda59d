"""The time that a run still needs: the fit, and the sum over phases."""

from __future__ import annotations

import pytest

from hvd_batchgrow.schedule.cost.time_left import TimeLeft, phase_sizes
from hvd_batchgrow.schedule.plan import compile_plan
from tests.helpers import NUM_TRAIN, small_job

PLAN = compile_plan(small_job(), 2, NUM_TRAIN)
PHASES = phase_sizes(PLAN)


def expected(fixed_s: float, sample_s: float, samples: int) -> list[float]:
    """Seconds that are left in each phase, update by update."""
    left = []
    for phase, layout in zip(PLAN.schedule.phases, PLAN.layouts, strict=True):
        starts = range(phase.start_samples, phase.end_samples, phase.global_batch)
        updates = [start for start in starts if start >= samples]
        left.append(len(updates) * (fixed_s + sample_s * phase.global_batch / layout.ranks))
    return left


def test_updates_of_two_sizes_determine_the_rest() -> None:
    fixed_s, sample_s, time_left = 0.25, 0.01, TimeLeft()
    for phase, layout in list(zip(PLAN.schedule.phases, PLAN.layouts, strict=True))[:2]:
        per_rank = phase.global_batch / layout.ranks
        time_left.add(per_rank, 3, 3 * (fixed_s + sample_s * per_rank))
    samples = PLAN.schedule.phases[1].start_samples + PLAN.schedule.phases[1].global_batch
    assert time_left.seconds(PHASES, samples) == pytest.approx(expected(fixed_s, sample_s, samples))


def test_with_one_size_the_time_is_proportional_to_the_samples() -> None:
    time_left = TimeLeft()
    assert time_left.seconds(PHASES, 0) is None
    time_left.add(8, 4, 4 * 0.4)  # 0.05 s per sample of a rank
    assert time_left.seconds(PHASES, 0) == pytest.approx(expected(0, 0.05, 0))
    assert time_left.seconds(PHASES, PLAN.schedule.end_samples) == [0.0] * len(PHASES)


def test_recent_updates_count_more() -> None:
    time_left = TimeLeft()
    time_left.add(8, 10, 10 * 1.0)
    for _ in range(10):
        time_left.add(8, 10, 10 * 2.0)
    found = time_left.seconds(PHASES, 0)
    assert found is not None
    assert found[0] == pytest.approx(2 * expected(1.0, 0.0, 0)[0], rel=1e-2)
