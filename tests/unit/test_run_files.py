"""Reading a run's records from valid, missing and damaged files."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.reports.build import build_document
from hvd_batchgrow.reports.document import Table
from hvd_batchgrow.reports.markdown import markdown_text
from hvd_batchgrow.results.live_plan import LivePlan
from hvd_batchgrow.results.live_state import LiveState
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_summary import read_summary, result_line
from hvd_batchgrow.schedule.adaptive.decisions import Decision, decisions_text
from tests.helpers import plan_tree

RECORDS: list[dict[str, Any]] = [
    {"kind": "train", "samples": 20, "updates": 2, "loss": 1.5, "samples_per_s": 10.0},
    {"kind": "eval", "samples": 20, "loss": 1.25, "top1": 0.5, "dataset": "validation"},
    {"kind": "train", "samples": 50, "updates": 3, "loss": None, "samples_per_s": 15.0},
    {"kind": "train", "samples": 60, "updates": 4, "loss": 1.0, "gradient_noise": {"all": {"b_simple": 7.5}}},
]


def write_run(folder: Path, lines: list[str], **job: Any) -> Path:
    (folder / "plan.json").write_text(json.dumps(plan_tree(30, 60, seed=3, **job)))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "record.json").write_text(json.dumps({"attempts": [{"host": "a"}, {"host": "b"}]}))
    return folder


def test_records_become_columns(tmp_path: Path) -> None:
    run = RunFiles.read(write_run(tmp_path, [json.dumps(line) for line in RECORDS]))
    assert run.faults == ()
    assert (run.name, run.seed, run.samples, run.updates, run.is_finished) == ("small", 3, 60, 4, True)
    np.testing.assert_array_equal(run.column("loss"), [1.5, np.nan, 1.0])
    np.testing.assert_array_equal(run.column("gradient_noise.all.b_simple"), [np.nan, np.nan, 7.5])
    np.testing.assert_array_equal(run.column("no such column"), [np.nan] * 3)
    # 20 samples at 10 a second, 30 at 15; the last record has no speed.
    np.testing.assert_array_equal(run.seconds, [2.0, 4.0, 4.0])
    assert run.evaluations == ({"dataset": "validation", "samples": 20, "loss": 1.25, "top1": 0.5},)
    assert [attempt["host"] for attempt in run.attempts] == ["a", "b"]


def test_the_decisions_of_a_replay_are_read(tmp_path: Path) -> None:
    decision = Decision(20, "plateau", "no improvement", 10, 20, 20.0, 0.1, 0.1)
    write_run(tmp_path, [json.dumps(line) for line in RECORDS])
    (tmp_path / "decisions.jsonl").write_bytes(decisions_text("other/decisions.jsonl", [decision]))
    run = RunFiles.read(tmp_path)
    assert run.faults == ()
    assert run.decisions == (decision.to_dict(),)


def test_a_line_cut_short_by_a_kill_is_not_a_fault(tmp_path: Path) -> None:
    run = RunFiles.read(write_run(tmp_path, [json.dumps(RECORDS[0]), '{"kind": "tra']))
    assert (run.faults, run.samples, run.is_finished) == ((), 20, False)


def test_unreadable_lines_are_counted_and_the_others_read(tmp_path: Path) -> None:
    lines = [json.dumps(RECORDS[0]), "{", json.dumps(RECORDS[2]), "\x00", json.dumps(RECORDS[3])]
    run = RunFiles.read(write_run(tmp_path, lines))
    path = tmp_path / "metrics.jsonl"
    assert run.faults == (f"{path} is damaged: 2 of 5 lines cannot be read: 2, 4",)
    assert run.column("samples").tolist() == [20, 50, 60]


def test_a_counter_that_goes_back_is_reported(tmp_path: Path) -> None:
    run = RunFiles.read(write_run(tmp_path, [json.dumps(RECORDS[k]) for k in (0, 2, 0, 3)]))
    assert "the sample counter goes back in 1 lines" in run.faults[0]
    assert run.column("samples").tolist() == [20, 50, 60]


def test_a_run_without_records_is_empty(tmp_path: Path) -> None:
    write_run(tmp_path, [])
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "record.json").write_text("[]")
    run = RunFiles.read(tmp_path)
    assert (run.samples, run.updates, run.evaluations, run.attempts) == (0, 0, (), ())
    assert len(run.seconds) == 0
    assert run.faults == (f"{tmp_path / 'record.json'} is damaged: list indices must be integers or slices, not str",)


@pytest.mark.parametrize("value", ["text", [1], {"a": "b"}, True, None])
@pytest.mark.parametrize("key", ["loss", "updates", "samples_per_s", "top1", "dataset", "epoch"])
def test_values_of_another_type_count_as_missing(tmp_path: Path, key: str, value: Any) -> None:
    write_run(tmp_path, [json.dumps(line | {key: value}) for line in RECORDS], task={"name": "classification"})
    run, summary = RunFiles.read(tmp_path), read_summary(tmp_path)
    assert run.faults == ()
    assert summary.samples == 60
    is_usable = key != "top1" and (key, value) != ("loss", None)  # a loss that is not finite is written as null
    assert summary.last == (0.5 if is_usable else None)
    if key == "loss":
        assert np.isnan(run.column("loss")).all()


@pytest.mark.parametrize("task", [{"name": "<script>"}, {"name": 3}, {"loss": []}, {"name": "module:name"}])
def test_an_unknown_task_has_the_first_metric_on_record(tmp_path: Path, task: dict[str, Any]) -> None:
    write_run(tmp_path, [json.dumps(line) for line in RECORDS], task=task)
    assert read_summary(tmp_path).metric == "top1"


@pytest.mark.parametrize("is_described", [True, False])
@pytest.mark.parametrize("value", [0.25, None])  # None: not finite
def test_the_main_metric_of_a_custom_task_is_its_first(tmp_path: Path, value: float | None, is_described: bool) -> None:
    line = {"kind": "eval", "samples": 20, "loss": 1.5, "f1": value, "mae": 0.5, "dataset": "test"}
    folder = write_run(tmp_path, [json.dumps(line)], task={"name": "module:name"})
    if is_described:
        (folder / "model.json").write_text(json.dumps({"task": {"metrics": {"f1": "up", "mae": "down"}}}))
    summary = read_summary(folder)
    assert (summary.metric, summary.last) == ("f1", value)
    state = LiveState(LivePlan.of(json.loads((folder / "plan.json").read_text())))
    state.add(line)
    assert state.plan.metric == "f1"
    (folder / "metrics.jsonl").write_text("")  # before the first evaluation
    assert read_summary(folder).metric == ("f1" if is_described else "loss")


@pytest.mark.parametrize("name", ["plan.json", "metrics.jsonl", "decisions.jsonl", "record.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b"3", b'"x"', b'{"samples": "3"}'])
def test_any_bytes_are_read_or_reported(tmp_path: Path, name: str, content: bytes) -> None:
    write_run(tmp_path, [json.dumps(line) for line in RECORDS])
    (tmp_path / name).write_bytes(content + b"\n{}")
    if name == "plan.json":
        with pytest.raises(RunError, match=re.escape(str(tmp_path / name))):
            RunFiles.read(tmp_path)
    else:
        assert str(tmp_path / name) in RunFiles.read(tmp_path).faults[0]


def test_results_are_named_after_the_set_that_they_belong_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverged = {"kind": "eval", "samples": 60, "loss": None, "top1": None, "dataset": "test"}
    folder = write_run(tmp_path, [json.dumps(line) for line in [*RECORDS, diverged]])
    summary = read_summary(folder)
    assert (summary.last, summary.last_dataset) == (None, "test")  # not the last finite value
    assert (summary.best, summary.best_dataset) == (0.5, "validation")
    assert result_line(summary) == "test accuracy not finite, best during training: validation accuracy 50.00 %"
    for command in ("show", "list"):
        assert main([command, str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.count("accuracy not finite") == 2
    assert "accuracy 50.00 % (validation)" in " ".join(out.split())
    (row,) = next(t for t in build_document([folder]).blocks(Table) if t.name == "runs").rows
    assert (row["metric"], row["best"], row["best_dataset"]) == ("test accuracy", 0.5, "validation")
    assert "| test accuracy | not finite | 50.00 % | validation |" in markdown_text(build_document([folder]))


def test_a_run_whose_last_evaluation_fails_is_failed(tmp_path: Path) -> None:
    """The defect: the sample counter is at the end of the plan, so the run was shown as finished."""
    folder = write_run(tmp_path, [json.dumps(line) for line in RECORDS])
    assert read_summary(folder).state == "finished"
    (folder / "record.json").write_text(json.dumps({"attempts": [{}, {"error": "test loss is not finite"}]}))
    assert read_summary(folder).state_text == "failed: test loss is not finite"


@pytest.mark.parametrize("key", ["start_samples", "global_batch", "num_updates"])
def test_a_plan_with_a_number_that_no_run_reaches_is_damaged(tmp_path: Path, key: str) -> None:
    plan = plan_tree(30, 60, seed=3)
    plan["phases"][0][key] = 10**400
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match=rf"plan.json is damaged, or not a plan: phases.*{key}"):
        RunFiles.read(tmp_path)


def test_names_of_a_record_cannot_change_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps(RECORDS[0]), json.dumps(RECORDS[1] | {"dataset": "\x1b[1m"})]
    folder = write_run(tmp_path, lines, schedule={"policy": "\x1b[2J"})
    plan = json.loads((folder / "plan.json").read_text()) | {"job": "\x1b[3J"}
    (folder / "plan.json").write_text(json.dumps(plan))
    (tmp_path.parent / f".{folder.name}.lock").write_text("\x1b[4m\nmark")
    for command in ("show", "list"):
        assert main([command, str(folder)]) == 0
        assert "\x1b" not in capsys.readouterr().out
    summary = read_summary(folder)
    assert (summary.name, summary.policy, summary.host) == ("\\x1b[3J", "\\x1b[2J", "\\x1b[4m")


def test_a_mark_from_the_future_is_not_fresh(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [json.dumps(RECORDS[0])])
    lock = tmp_path.parent / f".{folder.name}.lock"
    lock.write_text("process 1 on a\nmark")
    os.utime(lock, (time.time() + 3600,) * 2)  # of a machine whose clock is wrong; its process may be long gone
    assert read_summary(folder).state == "stopped"
