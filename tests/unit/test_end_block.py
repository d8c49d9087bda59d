"""The end block: its numbers against those computed from metrics.jsonl and record.json."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.messages.wording import short_time
from hvd_batchgrow.observers.attempt_times import AttemptTimes
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.end_block import print_end_block
from hvd_batchgrow.results.account import account_of
from hvd_batchgrow.results.run_cost import RunCost
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.events import BranchesCompared, BranchStarted, Evaluation, RunEnded
from tests.helpers import NUM_TRAIN, small_job
from tests.unit.test_watch import started

PLAN = compile_plan(small_job(), 2, NUM_TRAIN)
SPEEDS = (100.0, 250.0)
PLANNED = (PLAN.layouts[0].ranks, PLAN.layouts[1].ranks)


def write_run(folder: Path, attempts: list[dict[str, Any]], ranks: tuple[int, int] | None = None) -> RunFiles:
    """Write a run that trained the first two phases of its plan, an update per record, with a speed per phase.

    Args:
        folder: of the run.
        attempts: of record.json.
        ranks: that trained each phase; None: those of the plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(PLAN.to_dict()))
    (folder / "record.json").write_text(json.dumps({"attempts": attempts}))
    lines, updates = [], 0
    for index, phase in enumerate(PLAN.schedule.phases[:2]):
        for k in range(phase.num_updates):
            updates += 1
            samples = phase.start_samples + (k + 1) * phase.global_batch
            lines.append({"kind": "train", "samples": samples, "updates": updates, "phase": index})
            lines[-1] |= {"samples_per_s": SPEEDS[index], "ranks": (ranks or PLANNED)[index]}
    for top1 in (0.5, 0.75, 0.25):
        lines.append({"kind": "eval", "samples": lines[-1]["samples"], "top1": top1, "loss": 1.0, "dataset": "test"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFiles.read(folder)


def block(run: RunFiles, price: float | None = None, width: int = 80) -> str:
    out = io.StringIO()
    print_end_block(PlainConsole(out, width, is_terminal=True), run, price)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


TWO = [{"ranks": 2, "elapsed_s": 1800.0, "evaluation_s": 60.0}, {"ranks": 4, "elapsed_s": 900.0, "evaluation_s": 30.0}]


def test_the_numbers_of_the_phases(tmp_path: Path) -> None:
    text = block(write_run(tmp_path / "run", TWO))
    done, later = PLAN.schedule.phases[:2], PLAN.schedule.phases[2:]
    rows = [line.split() for line in text.splitlines()]
    for index, phase in enumerate(done):
        samples = phase.num_updates * phase.global_batch
        seconds = samples / SPEEDS[index]
        hours = f"{PLAN.layouts[index].ranks * seconds / 3600:.3g}"
        done_text = f"{index + 1} {phase.global_batch} {phase.num_updates} {samples}"
        assert f"{done_text} {short_time(seconds)} {SPEEDS[index]:.0f} {hours}".split() in rows
    for index, phase in enumerate(later, start=3):
        samples = phase.num_updates * phase.global_batch
        assert f"{index} {phase.global_batch} 0 of {phase.num_updates} 0 of {samples} 0 s 0".split() in rows
    assert "test accuracy 25.00 %, best during training: test accuracy 75.00 %" in text
    assert max(map(len, text.splitlines())) <= 80


def test_rank_hours_are_those_of_the_ranks_that_trained_and_not_of_the_last_plan(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TWO, ranks=(7, 3))  # a resume on other ranks replaces plan.json
    hours = [
        ranks * phase.num_updates * phase.global_batch / speed / 3600
        for phase, speed, ranks in zip(PLAN.schedule.phases, SPEEDS, (7, 3), strict=False)
    ]
    assert [phase.rank_hours for phase in account_of(run).phases[:2]] == pytest.approx(hours)
    assert RunCost.of(run).rank_hours == pytest.approx(sum(hours))


def change_records(run: RunFiles, change: Callable[[dict[str, Any]], Any]) -> RunFiles:
    path = run.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFiles.read(run.folder)


def test_records_count_for_the_phase_of_the_plan_in_which_they_begin(tmp_path: Path) -> None:
    """A fork keeps the records of its origin, which name the phases of the origin's plan."""
    run = write_run(tmp_path / "run", TWO)
    forked = change_records(run, lambda line: line.update(phase=5))
    assert account_of(forked).phases == account_of(run).phases
    assert sum(phase.updates for phase in account_of(forked).phases) == run.updates


def test_a_phase_keeps_its_number_beside_one_without_updates(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TWO)
    empty = {**run.plan["phases"][0], "num_updates": 0}
    plan = {**run.plan, "phases": [empty, *run.plan["phases"]]}
    found = account_of(replace(run, plan=plan)).phases
    assert [phase.index for phase in found] == [1, 2, 3, 4][: len(found)]
    assert [phase.updates for phase in found] == [phase.updates for phase in account_of(run).phases]


def test_rank_hours_without_the_ranks_on_record_are_unknown(tmp_path: Path) -> None:
    known = write_run(tmp_path / "known", TWO)
    unknown = change_records(write_run(tmp_path / "unknown", TWO), lambda line: line.pop("ranks", None))
    assert RunCost.of(unknown).rank_hours is None
    assert RunCost.mean([known, unknown]).rank_hours is None
    assert RunCost.mean([known, known]) == RunCost.of(known)


def test_the_time_is_split_and_the_cost_is_that_of_all_ranks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TWO)
    updates_s = sum(p.num_updates * p.global_batch / s for p, s in zip(PLAN.schedule.phases, SPEEDS, strict=False))
    text = block(run, price=1.5, width=100)
    split = f"updates {short_time(updates_s)}, evaluation 1:30 min, other {short_time(2700 - 90 - updates_s)}"
    assert f"time: 45:00 min in 2 invocations: {split}\n" in text
    assert "cost: 3.00 = 2 rank-hours × 1.5 per rank-hour\n" in text  # 2 × 1/2 h + 4 × 1/4 h
    assert "cost" not in block(run)


def test_updates_of_the_origin_of_a_fork_are_not_time_of_its_invocation(tmp_path: Path) -> None:
    updates_s = sum(p.num_updates * p.global_batch / s for p, s in zip(PLAN.schedule.phases, SPEEDS, strict=False))
    run = write_run(tmp_path / "run", [{"ranks": 2, "elapsed_s": updates_s / 2, "evaluation_s": 0.0}])
    known = f"time: {short_time(updates_s / 2)} in 1 invocation; all updates on record: {short_time(updates_s)}, some"
    assert known in block(run, width=140)
    assert account_of(run).other_s is None


@pytest.mark.parametrize("elapsed", [None, "x", -1.0, True, [1]])
def test_a_killed_invocation_makes_the_cost_a_lower_bound(tmp_path: Path, elapsed: Any) -> None:
    killed = {"ranks": 8, "elapsed_s": elapsed}
    text = block(write_run(tmp_path / "run", [*TWO, killed]), price=1.5)
    assert "in 3 invocations (1 of them not timed): " in text
    assert "cost: at least 3.00 = 2 rank-hours" in text


def test_without_times_the_cost_is_that_of_the_updates(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"ranks": 2}])
    hours = sum(
        layout.ranks * phase.num_updates * phase.global_batch / speed / 3600
        for phase, layout, speed in zip(PLAN.schedule.phases, PLAN.layouts, SPEEDS, strict=False)
    )
    assert f"cost: at least {hours * 100:.2f} = {hours:.4g} rank-hours of updates × 100" in block(run, price=100.0)
    assert account_of(run).total_s is None


def test_each_invocation_adds_its_times_to_the_record(tmp_path: Path) -> None:
    record, now = tmp_path / "record.json", [50.0]
    record.write_text(json.dumps({"attempts": [{"ranks": 1, "elapsed_s": 9.0}, {"ranks": 2}], "data": {"mean": [0.5]}}))
    times = AttemptTimes(lambda: now[0])
    times.on_start(started(tmp_path))
    for seconds in (2.0, 3.0):
        now[0] += 10
        times.on_evaluation(Evaluation(16, 0.1, 1.0, {}, seconds=seconds))
    first, last = json.loads(record.read_text())["attempts"]
    assert first == {"ranks": 1, "elapsed_s": 9.0}
    assert last == {"ranks": 2, "elapsed_s": 20.0, "evaluation_s": 5.0}  # what a kill would leave
    now[0] += 7
    times.on_end(RunEnded("small", tmp_path, True, 16, 1, 1, 1.0, None))
    assert json.loads(record.read_text())["attempts"][1]["elapsed_s"] == 27.0
    assert json.loads(record.read_text())["data"] == {"mean": [0.5]}


def test_the_pauses_for_branches_are_timed_also_if_a_stop_ends_one(tmp_path: Path) -> None:
    record, now = tmp_path / "record.json", [50.0]
    record.write_text(json.dumps({"attempts": [{"ranks": 1}]}))
    times = AttemptTimes(lambda: now[0])
    times.on_start(started(tmp_path))
    now[0] += 1
    for factor in (1, 2):
        times.on_branch(BranchStarted(16, factor, 16 * factor, 32))
        now[0] += 10
    times.on_branches(BranchesCompared(16, 16, 16, 20.0, ""))
    written = {"ranks": 1, "elapsed_s": 21, "evaluation_s": 0, "branches_s": 20}
    assert json.loads(record.read_text())["attempts"] == [written]
    times.on_branches(BranchesCompared(48, 16, 0, 0.0, "over budget"))
    now[0] += 5
    times.on_branch(BranchStarted(64, 1, 16, 32))
    now[0] += 3
    times.on_end(RunEnded("small", tmp_path, False, 64, 1, 1, 1.0, None))
    (attempt,) = json.loads(record.read_text())["attempts"]
    assert (attempt["elapsed_s"], attempt["branches_s"]) == (29.0, 23.0)


def test_the_time_of_branches_is_shown_apart(tmp_path: Path) -> None:
    updates_s = float(write_run(tmp_path / "run", []).seconds[-1])
    attempt = {"ranks": 2, "elapsed_s": updates_s + 100, "evaluation_s": 10.0, "branches_s": 70.0}
    run = write_run(tmp_path / "run", [attempt])
    assert account_of(run).other_s == pytest.approx(20)
    assert "evaluation 10 s, branches 1:10 min, other 20 s" in " ".join(block(run, width=140).split())


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"attempts": []}', '{"attempts": [3]}', '{"attempts": 3}'])
def test_a_damaged_record_stays_as_it_is(tmp_path: Path, text: str | None) -> None:
    record = tmp_path / "record.json"
    if text is not None:
        record.write_text(text)
    times = AttemptTimes()
    times.on_start(started(tmp_path))
    times.on_end(RunEnded("small", tmp_path, True, 16, 1, 1, 1.0, None))
    assert (record.read_text() if record.exists() else None) == text


def test_show_prints_the_block_and_its_numbers_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", TWO)
    assert main(["show", str(run.folder), "--price", "1.5"]) == 0
    text = capsys.readouterr().out
    assert block(run, 1.5, width=140) in text
    assert main(["show", str(run.folder), "--price", "1.5", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)["account"]
    assert (account["cost"], account["rank_hours"], account["total_s"]) == (3.0, 2.0, 2700.0)
    assert [phase["updates"] for phase in account["phases"]][:2] == [p.num_updates for p in PLAN.schedule.phases[:2]]


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "dear"])
def test_a_price_is_a_number(price: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path), f"--price={price}"]) == 2
    assert "--price: " in capsys.readouterr().err
