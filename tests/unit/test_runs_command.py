"""`hvd-batchgrow list` and `show`: what they say of a run follows from its files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.cli import main
from hvd_batchgrow.results.run_summary import read_summary
from tests.helpers import NUM_TRAIN, job_tree, small_source, write_idx_folder

RUN = Path("runs/small")


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after 10 updates, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    write_idx_folder(Path("data"), small_source())
    Path("job.toml").write_text(tomli_w.dumps(job_tree("data", evaluation={"every_epochs": 0.25})))
    assert main(["train", "job.toml", "--max-updates", "10"]) == 75
    return RUN


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main([*words]) == code
    return capsys.readouterr().out


def test_a_stopped_run(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, evaluations = read_summary(stopped), [line for line in lines_of(stopped) if line["kind"] == "eval"]
    assert (found.state, found.host, found.attempts, found.twin) == ("stopped", None, 1, None)
    plan = json.loads((stopped / "plan.json").read_text())
    batches = [phase["global_batch"] for phase in plan["phases"] for _ in range(phase["num_updates"])]
    assert (found.updates, found.samples) == (10, sum(batches[:10]))
    assert found.epoch == found.samples / NUM_TRAIN
    assert (found.num_updates, found.end_samples) == (plan["num_updates"], plan["end_samples"])
    assert found.last == evaluations[-1]["top1"]
    assert found.best == max(line["top1"] for line in evaluations)
    text = printed(capsys, "show", str(stopped))
    assert f"small: stopped\nepoch {found.epoch:.2f} of " in text
    assert "to resume: hvd-batchgrow train runs/small/job.toml --runs-dir runs --resume auto" in text
    assert "stopped" in printed(capsys, "list")


def test_the_command_that_it_prints_resumes_the_run(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [line for line in printed(capsys, "show", str(stopped)).splitlines() if line.startswith("to resume")]
    assert main(command.removeprefix("to resume: hvd-batchgrow ").split()) == 0
    found = read_summary(stopped)
    assert (found.state, found.samples, found.attempts) == ("finished", found.end_samples, 2)
    assert found.updates == found.num_updates
    trained = [line for line in lines_of(stopped) if line["kind"] == "train"]
    befores = [0, *(line["samples"] for line in trained)]
    seconds = sum((line["samples"] - b) / line["samples_per_s"] for b, line in zip(befores, trained, strict=False))
    assert found.training_s == pytest.approx(seconds)
    text = printed(capsys, "show", str(stopped))
    assert "small: finished" in text
    assert "to evaluate: hvd-batchgrow evaluate runs/small" in text


def test_a_run_is_running_while_its_lock_is_renewed(stopped: Path) -> None:
    lock = Path("runs/.small.lock")
    lock.write_text("process 7 on node3\nmachine x beat 2\n")
    assert (read_summary(stopped).state, read_summary(stopped).host) == ("running", "process 7 on node3")
    os.utime(lock, (1e9, 1e9))  # the mark of a process that was killed
    assert read_summary(stopped).state == "stopped"


def test_a_folder_of_runs(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(stopped, "runs/small-twin")
    listed = [json.loads(line) for line in printed(capsys, "list", "runs", "--json").splitlines()]
    assert [(run["folder"], run["twin"]) for run in listed] == [
        ("runs/small", "small-twin"),
        ("runs/small-twin", "small"),
    ]
    assert "twin: runs/small-twin\n" in printed(capsys, "show", str(stopped))
    (Path("runs/small-twin") / "plan.json").write_text('{"job": "x"}')
    capsys.readouterr()
    assert main(["list"]) == 1
    captured = capsys.readouterr()
    assert "runs/small-twin/plan.json is damaged, or not a plan: num_samples: Field required" in captured.err
    assert " small " in captured.out


def test_a_run_without_records_is_shown(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / "metrics.jsonl").unlink()
    (stopped / "record.json").write_text("damaged")
    found = read_summary(stopped)
    assert (found.samples, found.updates, found.last, found.best, found.attempts) == (0, 0, None, None, 0)
    text = printed(capsys, "show", str(stopped))
    assert "epoch 0.00 of" in text
    assert "runs/small/record.json is damaged: " in text
    assert main(["list"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "run"], "run is not a folder; did you mean runs?"),
        (["list", "data"], "data contains no run: a run folder has a plan.json"),
        (["show", "runs/smal"], "runs/smal does not hold a run; did you mean runs/small?"),
    ],
)
def test_folders_that_hold_no_run(
    stopped: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(words) == 1
    assert message in capsys.readouterr().err


def test_only_folders_are_suggested_for_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.py").touch()
    assert main(["list", "runs"]) == 1
    assert capsys.readouterr().err == "runs is not a folder\n"
    Path("runz").mkdir()
    assert main(["list", "runs"]) == 1
    assert capsys.readouterr().err == "runs is not a folder; did you mean runz?\n"
