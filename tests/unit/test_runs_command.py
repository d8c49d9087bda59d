"""`hvd-batchgrow list` and `show`: what they say of a run follows from its files."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.messages.suggest import near_folder
from hvd_batchgrow.results.run_summary import find_runs, read_summary
from hvd_batchgrow.train.run.run_lock import RunLock
from tests.helpers import NUM_TRAIN, enter_with_job, job_tree

RUN = Path("runs/small")


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after 10 updates, in the working directory."""
    enter_with_job(tmp_path, job_tree("data", evaluation={"every_epochs": 0.25}), monkeypatch)
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


def test_a_renamed_run_is_resumed_under_its_new_name(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The defect: the printed command began a new run, or continued the original."""
    renamed = stopped.rename(stopped.with_name("renamed"))
    text = printed(capsys, "show", str(renamed))
    (command,) = [line for line in text.splitlines() if line.startswith("to resume")]
    assert main(shlex.split(command.partition("hvd-batchgrow ")[2])) == 0
    assert read_summary(renamed).state == "finished"
    assert not stopped.exists()


def test_a_run_is_shown_from_within_its_folder(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defect: `.` has no name, so the lock and the twin were not found."""
    with RunLock(stopped) as lock:
        lock.take()
        monkeypatch.chdir(stopped)
        assert read_summary(Path()).state == "running"
    text = printed(capsys, "show", ".")
    assert f"train {Path.cwd() / 'job.toml'} --runs-dir {Path.cwd().parent} --resume auto" in text


def test_leftovers_of_a_killed_overwrite_are_not_runs(stopped: Path) -> None:
    shutil.copytree(stopped, stopped.with_name(".small.removed"))
    assert find_runs(stopped.parent) == [stopped]


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


def test_a_run_that_ends_with_an_error_is_failed(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "job.toml", "--name", "bad", "--optim.lr", "1e20"]) == 1
    (attempt,) = json.loads(Path("runs/bad/record.json").read_text())["attempts"]
    error = attempt["error"]
    assert error.startswith("update ")
    assert error.endswith(" is not finite")
    assert "\n" not in error
    found = read_summary(Path("runs/bad"))
    assert (found.state, found.error) == ("failed", error)
    text = printed(capsys, "show", "runs/bad")
    assert f"bad: failed: {error}\n" in text
    assert "to resume after the cause is fixed: hvd-batchgrow train runs/bad/job.toml" in text
    assert "failed: update " in printed(capsys, "list")
    assert "finite" in printed(capsys, "watch", "runs/bad", code=1)
    assert main(["report", "runs/bad", "--dir", "pages"]) == 0
    assert f"| failed: {error} |" in Path("pages/report.md").read_text().replace("\\", "")
    # A kill leaves no error, and neither does a new attempt.
    assert read_summary(stopped).error is None
    record = json.loads((stopped / "record.json").read_text())
    record["attempts"] = [attempt, record["attempts"][0]]
    (stopped / "record.json").write_text(json.dumps(record))
    assert read_summary(stopped).state == "stopped"


def test_the_best_value_of_a_custom_task_follows_the_direction_in_model_json(stopped: Path) -> None:
    words = ["--name", "own", "--task.name", "tests.unit.test_tasks:Own", "--max-updates", "10"]
    assert main(["train", "job.toml", *words]) == 75
    described = Path("runs/own/model.json")
    tree = json.loads(described.read_text())
    assert tree["task"]["metrics"] == {"f1": "up"}
    metrics = Path("runs/own/metrics.jsonl")
    lines = lines_of(Path("runs/own"))
    values = iter([0.3, 0.5, 0.4])
    changed = [{**line, "f1": next(values, 0.4)} if line["kind"] == "eval" else line for line in lines]
    assert next(values, None) == 0.4  # two evaluations
    metrics.write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert (read_summary(Path("runs/own")).metric, read_summary(Path("runs/own")).best) == ("f1", 0.5)
    tree["task"]["metrics"] = {"f1": "down"}
    described.write_text(json.dumps(tree))
    assert read_summary(Path("runs/own")).best == 0.3


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
        (["show", "small"], "small does not hold a run; did you mean runs/small?"),
        (["digest", "smal"], "smal does not hold a run; did you mean runs/small?"),
        (["audit", "runs"], "runs does not hold a run; it contains runs: hvd-batchgrow list runs"),
        (["watch", "runs/smal"], "runs/smal does not hold a run; did you mean runs/small?"),
        (["report", "smal"], "smal is not a folder; did you mean runs/small?"),
        (["evaluate", "runs"], "runs does not hold a run; it contains runs: hvd-batchgrow list runs"),
        (["status", "runs/smal"], "runs/smal is not a folder; did you mean runs/small?"),
    ],
)
def test_folders_that_hold_no_run(
    stopped: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(words) == 1
    assert message in capsys.readouterr().err


def test_only_similar_runs_are_suggested_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smart").touch()
    for folder in ("small", "smalls", "n_nchw", "runs/x_pairlen"):
        Path(folder).mkdir(parents=True)
    Path("runs/x_pairlen/plan.json").touch()
    assert main(["show", "smal"]) == main(["show", "runs/failed1"]) == main(["list", "smal"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "smal does not hold a run",
        "runs/failed1 does not hold a run",
        "smal is not a folder",
    ]
    assert main(["list", "run"]) == 1
    assert capsys.readouterr().err == "run is not a folder; did you mean runs?\n"
    assert near_folder(Path("smal")) == "; did you mean small?"
    assert near_folder(Path("nosuch")) == ""
