"""The predicted figures of docs/results.md follow from the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.schedule.cost.cost import predict
from hvd_batchgrow.schedule.cost.machine import load_machine
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.twin import compile_twin, decay_twin

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/results.md").read_text()
NUM_SAMPLES = 1_281_167
GROWN = {"layout.grow_by": "ranks", "layout.ranks_per_phase": [64, 128, 128, 128]}


def cost_of(plan: Plan, machine: str) -> tuple[float, float]:
    """Return the predicted seconds and rank-hours of a plan."""
    cost = predict(plan, load_machine(ROOT / "machines" / f"{machine}.toml"))
    return cost.seconds, cost.chain_rank_hours


def stated(cell: str) -> tuple[float, float]:
    """Return the seconds and the rank-hours of a cell such as `12:34 min, 13.40 rank-hours`."""
    found = re.fullmatch(r"(\d+):(\d+) min, ([\d.]+) rank-hours", cell)
    assert found, cell
    return 60 * int(found[1]) + int(found[2]), float(found[3])


@pytest.mark.parametrize(
    ("row", "machine", "decay_ranks"),
    [
        ("8 A100 per host, InfiniBand; decay on 64 ranks", "dgx_a100_resnet50", 64),
        ("8 A100 per host, InfiniBand; decay on 128 ranks", "dgx_a100_resnet50", 128),
        ("8 V100 per host, 10 Gbit/s Ethernet; decay on 128 ranks", "dgx1_v100_ethernet_resnet50", 128),
    ],
)
def test_the_predicted_costs_of_growth_and_decay(row: str, machine: str, decay_ranks: int) -> None:
    (line,) = [line for line in PAGE.splitlines() if row in line]
    decay, growth = map(stated, line.split(" | ")[2:4])
    job = load_job(ROOT / "jobs/imagenet_resnet50_grow.toml", GROWN)
    twin = decay_twin(job, NUM_SAMPLES)
    for expected, plan in (
        (growth, compile_plan(job, 128, NUM_SAMPLES)),
        (decay, compile_twin(twin, decay_ranks, NUM_SAMPLES)),
    ):
        seconds, rank_hours = cost_of(plan, machine)
        assert seconds == pytest.approx(expected[0], abs=1)
        assert rank_hours == pytest.approx(expected[1], abs=0.06)


def test_the_gradients_of_the_quickstart() -> None:
    updates = {"growth": 1900, "decay": 5625}
    assert f"{updates['growth']:,} updates instead of\n{updates['decay']:,}" in PAGE
    megabytes = 246_394 * 4 / 1e6
    assert f"{megabytes:.2f} MB" in PAGE
    assert f"{megabytes * updates['growth'] / 1e3:.1f} GB per rank instead of {megabytes * 5625 / 1e3:.1f} GB" in PAGE
