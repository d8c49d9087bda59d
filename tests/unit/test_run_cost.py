"""The cost of a run counts the branches that its trigger has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.reports.build import build_document
from hvd_batchgrow.reports.document import Table
from hvd_batchgrow.results.run_cost import RunCost
from hvd_batchgrow.results.run_files import RunFiles
from tests.reported_runs import change_json
from tests.unit.test_comparison import compared, printed, write_run
from tests.unit.test_confounds import forked


def with_branches(run: RunFiles, lines: list[dict[str, Any]]) -> RunFiles:
    """Add branches.jsonl to a run, and 36 s of branches to its last invocation."""
    (run.folder / "branches.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change_json(
        run.folder / "record.json", lambda record: record["attempts"][-1].update(elapsed_s=100.0, branches_s=36.0)
    )
    return RunFiles.read(run.folder)


def branch(samples: int, factor: int, batch: int = 128) -> dict[str, Any]:
    return {
        "kind": "branch",
        "samples": samples,
        "factor": factor,
        "global_batch": factor * batch,
        "end_samples": samples + 4096,
    }


def result(samples: int, *batches: int) -> dict[str, Any]:
    table = {"branches": [{"global_batch": batch} for batch in batches]}
    return {"kind": "branches", "samples": samples, "branch_samples": 4096, "seconds": 18.0, "table": table}


TWO = [branch(100, 1), branch(100, 2), result(100, 128, 256)]


def test_branches_of_a_trigger_are_part_of_the_cost(tmp_path: Path) -> None:
    """The defect: a trigger seemed to find its batches without an update."""
    run = write_run(tmp_path / "a", 1, 0.8, ranks=3)
    cost = RunCost.of(run)
    assert (cost.updates, cost.samples, cost.seconds, cost.branch_updates) == (20, 400, 8.0, 0)  # 50 samples/s
    cost = RunCost.of(with_branches(run, TWO))
    assert (cost.updates, cost.branch_updates) == (20 + 32 + 16, 32 + 16)  # 4,096 samples at 128 and at 256
    assert (cost.samples, cost.seconds) == (400 + 2 * 4096, 8.0 + 36.0)
    assert cost.rank_hours == pytest.approx(3 * (8 + 36) / 3600)


@pytest.mark.parametrize(
    "lines",
    [
        [branch(100, 1), branch(100, 2), branch(100, 2)],  # a stop in the second branch, and a resume
        [branch(100, 2), result(100, 128, 256)],  # the first one was finished before the lines of a pause began again
        [*TWO, {"kind": "branches", "samples": 300, "branch_samples": 0, "seconds": 0.0, "table": {}}],
        [
            *TWO,
            branch(300, 0),
            {**branch(300, 1), "end_samples": "x"},
            {"kind": "branches", "samples": 300, "table": [1]},
        ],
    ],
)
def test_each_branch_counts_once(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    assert RunCost.of(with_branches(write_run(tmp_path / "a", 1, 0.8), lines)).branch_updates == 48


def test_pauses_have_the_ranks_that_the_run_has_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 1, 0.8, ranks=1)
    path = run.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["ranks"] = 1 if line["samples"] <= 200 else 3
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = RunCost.of(with_branches(run, [result(100, 128), result(300, 128)]))  # 18 s on 1 rank, and 18 s on 3 ranks
    assert found.rank_hours == pytest.approx((4 * 1 + 4 * 3 + 18 * 1 + 18 * 3) / 3600)


def test_a_fork_has_the_time_of_the_branches_before_it(tmp_path: Path) -> None:
    run = with_branches(write_run(tmp_path / "a", 1, 0.8), [*TWO, result(300, 128)])
    assert RunCost.of(run).seconds == 8.0 + 36.0
    assert RunCost.of(forked(run, "b", samples=200)).seconds == 8.0 + 18.0 + 36.0  # its pauses took 36 s


def test_compare_and_report_say_which_updates_are_of_branches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [with_branches(write_run(tmp_path / "a", 1, 0.8), TWO), write_run(tmp_path / "b", 1, 0.8, "decay")]
    assert len(compared(runs).pairs) == 1
    out, _ = printed(capsys, tmp_path)
    assert [line.split()[1:3] for line in out.splitlines() if line.strip().startswith("first ")][-1] == ["68", "8,592"]
    assert "updates of a: 48 are those of branches that its trigger trained\n" in out
    document = build_document([run.folder for run in runs])
    tables = {table.name: table for table in document.blocks(Table)}
    assert [row["updates"] for row in tables["arms"].rows] == [68, 40, pytest.approx(40 / 68)]
    row = tables["runs"].rows[0]
    assert (row["updates"], row["branch_updates"], row["seconds"]) == (20, 48, 44.0)
    assert row["rank_hours"] == pytest.approx(2 * 44 / 3600)
