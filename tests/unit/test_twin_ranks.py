"""The twin is trained on the ranks that `plan` prints for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.cli.train import TwinCommand
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.schedule.cost.probe_file import save_probe
from hvd_batchgrow.train.run.plan_for_ranks import plan_for_ranks
from tests.lone_rank import LoneRank
from tests.unit.test_cost import make_probe, measure

# The first batch of the small job has 2 ghost batches. `lr_scale` quadruples the run's, not the twin's.
BY_RANKS = {"layout.grow_by": "ranks", "layout.max_micro_batch": 8}
ENLARGED = {"schedule.lr_scale": 4.0, "schedule.max_batch": 192}
CHEAPEST = {"layout.grow_by": "auto", "layout.objective": "least_rank_hours", "layout.time_limit_h": 1.0}


def words_of(overrides: dict[str, Any]) -> list[str]:
    return [word for key, value in overrides.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize(
    ("num_ranks", "overrides", "costs", "expected"),
    [
        (8, BY_RANKS, False, [2, 2, 2, 2]),
        (2, BY_RANKS, False, [2, 2, 2, 2]),
        (4, ENLARGED, False, [2, 2, 2, 2]),
        (8, {"layout.grow_by": "auto"}, True, [2, 2, 2, 2]),
        (4, CHEAPEST, True, [1, 1, 1, 1]),  # all-reduces take 0.02 s, and one rank needs none
    ],
)
def test_the_twin_uses_the_ranks_that_plan_prints(
    job: str,
    capsys: pytest.CaptureFixture[str],
    num_ranks: int,
    overrides: dict[str, Any],
    costs: bool,
    expected: list[int],
) -> None:
    cheap = {"alpha": 1e-12, "beta": 1e-18} if overrides is not CHEAPEST else {}
    made = make_probe(load_job(Path(job)), measure(1), measure(2, **cheap))
    save_probe(Path("P.json"), made)
    cost = ["--cost", "P.json"] if costs else []
    assert main(["plan", job, "--ranks", str(num_ranks), "--json", *words_of(overrides), *cost]) == 0
    printed = json.loads(capsys.readouterr().out)["twin"]
    ranks, command = LoneRank(num_ranks), TwinCommand(Path(job), cost=Path("P.json") if costs else None)
    command.load_growing(ranks, overrides)
    plan, _ = plan_for_ranks(command.load_twin(ranks, overrides), ranks)
    assert [layout.ranks for layout in plan.layouts] == [phase["ranks"] for phase in printed["phases"]] == expected
