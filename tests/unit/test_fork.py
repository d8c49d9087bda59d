"""A new run from a checkpoint of another."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.cli import main
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths
from hvd_batchgrow.train.run import fork
from hvd_batchgrow.verification.audit import audit, read_consumed
from hvd_batchgrow.verification.digest import compare_weights, final_weights
from tests.helpers import measured_job, measured_tree


def train(*words: str) -> int:
    return main(["train", "small.toml", *words])


def points(run: str) -> list[int]:
    lines = map(json.loads, Path("runs", run, "metrics.jsonl").read_text().splitlines())
    return [line["samples"] for line in lines if line["kind"] == "train"]


@pytest.fixture
def stopped(job: str) -> Path:
    """A run stopped after 12 updates: 10 of 16 samples, and 2 of 48."""
    assert train("--max-updates", "12") == 75
    return Path("runs/small")


def test_a_fork_continues_with_the_changed_job_and_leaves_the_original_run_unchanged(stopped: Path) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert train("--fork", "gentler", "--optim.lr", "0.02") == 0
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
    record = json.loads(Path("runs/gentler/record.json").read_text())
    assert record["forked_from"] == {
        "run": str(stopped.absolute()),
        "samples": 10 * 16 + 2 * 48,
        "changed": {"optim.lr": [0.05, 0.02]},
    }
    assert len(record["attempts"]) == 1
    weights = final_weights(Path("runs/gentler"))
    assert weights.is_final
    assert audit(read_consumed(weights.run), lambda *_: None).passed
    assert points("gentler") == sorted(set(points("gentler")))
    assert points("gentler")[0] == points("small")[0]
    # The change has an effect only after the fork.
    assert train("--resume", "auto") == 0
    assert compare_weights(final_weights(stopped), weights).startswith("differs by")


def test_a_fork_of_the_same_job_ends_with_the_weights_of_the_resumed_run(stopped: Path) -> None:
    assert train("--fork", "same") == 0
    assert train("--resume", "auto") == 0
    assert compare_weights(final_weights(stopped), final_weights(Path("runs/same"))) == "bit-identical"


@pytest.mark.parametrize("key", ["weight_decay", "nesterov"])
def test_a_fork_uses_the_changed_settings_of_the_optimizer(stopped: Path, key: str) -> None:
    value = {"weight_decay": 0.25, "nesterov": True}[key]
    assert train("--fork", "other", f"--optim.{key}", str(value).lower()) == 0
    assert train("--resume", "auto") == 0
    for run, expected in (("other", value), ("small", {"weight_decay": 1e-3, "nesterov": False}[key])):
        newest = checkpoint_paths(Path("runs", run, "checkpoints"))[-1].read_bytes()
        assert Checkpoint.from_bytes(newest).optimizer["param_groups"][0][key] == expected
    assert compare_weights(final_weights(stopped), final_weights(Path("runs/other"))).startswith("differs by")


def test_a_fork_is_resumed_by_its_own_name(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ("--optim.lr", "0.02")
    assert train("--fork", "gentler", *changed, "--max-updates", "1") == 75
    assert train("--fork", "gentler", *changed) == 1
    assert (
        "gentler exists already: resume it with --name gentler --resume auto, or fork under" in capsys.readouterr().err
    )
    assert train("--name", "gentler", "--resume", "auto", *changed) == 0
    assert train("--fork", "whole", *changed) == 0
    names = ("gentler", "whole")
    first, second = (final_weights(Path("runs", name)) for name in names)
    assert compare_weights(first, second) == "bit-identical"
    assert json.loads(Path("runs/gentler/record.json").read_text())["forked_from"]["samples"] == 256


PLATEAU = {"name": "plateau", "patience_epochs": 20.0}
NORM_TEST = {"name": "norm_test", "first_decision_epoch": 2.5}
BRANCH = {"name": "branch", "factors": [1, 2], "branch_samples": 512, "first_decision_epoch": 10.0}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PLATEAU, {**PLATEAU, "metric": "top1"}),
        (PLATEAU, NORM_TEST),
        (NORM_TEST, PLATEAU),
        (NORM_TEST, BRANCH),
        (BRANCH, PLATEAU),
    ],
)
def test_a_fork_with_another_trigger_begins_with_the_initial_state_of_the_trigger(
    job: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    for trigger, words in ((before, ()), (after, ("--fork", "other"))):
        Path(job).write_text(tomli_w.dumps(measured_tree("data", trigger, schedule={"epochs": 36.0})))
        assert train(*words, "--max-updates", "20") == 75  # with one evaluation
    state = Checkpoint.from_bytes(checkpoint_paths(Path("runs/other/checkpoints"))[-1].read_bytes()).growth["trigger"]
    if after["name"] != "plateau":
        assert (
            set(state)
            == {"norm_test": {"asks_since"}, "branch": {"round_at", "spent_samples", "over_budget_at"}}[after["name"]]
        )
        return
    lines = map(json.loads, Path("runs/other/metrics.jsonl").read_text().splitlines())
    (result,) = [line for line in lines if line["kind"] == "eval" and line["samples"] > 20 * 16]
    assert (state["best"], state["best_samples"]) == (result[after.get("metric", "loss")], result["samples"])


def test_a_fork_keeps_the_branches_that_count_towards_a_changed_budget() -> None:
    growth = {"replayed_from": None, "trigger": {"spent_samples": 1024}, "best": {}, "best_average": {}}
    job = measured_job(BRANCH, schedule={"epochs": 36.0})
    checkpoint: Any = SimpleNamespace(growth=growth)
    assert fork._growth(checkpoint, job, {"trigger.budget": (0.1, 0.05)}) == growth
    assert fork._growth(checkpoint, job, {"trigger.name": ("plateau", "branch")})["trigger"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "8"], "cannot be forked with a change of\n  seed: was 7, is 8\n  start a new run instead: --name"),
        (["--model.channels", "[4, 4]"], "cannot be forked with a change of\n  model.channels: was [4, 8], is [4, 4]"),
        (
            ["--model.classifier", "hadamard"],
            "cannot be forked with a change of\n  model.classifier: was 'linear', is 'hadamard'",
        ),
        (["--optim.name", "lars"], "cannot be forked with a change of\n  optim.name: was 'sgd', is 'lars'"),
        (
            ["--schedule.epochs", "0.8", "--schedule.boundaries-epochs", "[0.5]"],
            "is at sample 256, and this job ends at 256: nothing is left to train",
        ),
        # phase 2 then begins at 160, and 96 samples are 1.2 updates of 80
        (
            ["--schedule.noise_factor", "5.0"],
            "is at sample 256, 1.20 updates of 80 into the phase that begins at 160: no update of this job starts",
        ),
        # 96 samples are 3 updates of 32, but the run has made 2
        (
            ["--schedule.noise_factor", "2.0"],
            "had trained batch 16, batch 48 from sample 160 up to sample 256, and this job would have trained "
            "batch 16, batch 32 from sample 160: its updates could not be counted",
        ),
    ],
)
def test_a_job_that_cannot_continue_from_the_checkpoint_is_refused(
    stopped: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert train("--fork", "other", *words) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["small"]


def test_flags_that_contradict_a_fork(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--fork", "a", "--resume", "auto") == 2
    assert train("--fork", "a", "--overwrite") == 2
    assert train("--fork", "../a") == 2
    assert main(["twin", "small.toml", "--fork", "a"]) == 2
    assert train("--fork", "a") == 1
    assert "runs/small holds no checkpoint to fork from" in capsys.readouterr().err


def test_a_resume_reports_changed_settings(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    allowed = ("--layout.max-micro-batch", "8", "--logging.logs-per-epoch", "2")
    assert train("--resume", "auto", *allowed, "--max-updates", "1") == 75
    message = capsys.readouterr().err
    assert "changed since the last attempt: layout.max_micro_batch was 16, is 8" in message
    assert "changed since the last attempt: logging.logs_per_epoch was 5, is 2" in message
    assert train("--resume", "auto", "--optim.lr", "0.02", "--schedule.epochs", "2.0") == 1
    message = capsys.readouterr().err
    assert "optim.lr: was 0.05, is 0.02\n  schedule.epochs: was 2.2, is 2.0" in message
    assert "or from this checkpoint (--fork NAME)" in message


def test_no_silent_restart(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in checkpoint_paths(stopped / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-100])
    for words in (["--resume", "auto"], ["--fork", "other"]):
        assert train(*words) == 1
        message = capsys.readouterr().err
        assert "no good checkpoint is left:" in message
        num_bad = message.count("cut short")
        assert num_bad == len(checkpoint_paths(stopped / "checkpoints"))
    shutil.rmtree(stopped / "checkpoints")
    assert train("--name", "smal", "--resume", "auto", "--max-updates", "1") == 75
    assert "runs/smal does not exist yet: the run starts from the beginning" in capsys.readouterr().err
    assert train("--resume", "auto", "--max-updates", "1") == 75
    assert (
        "runs/small/checkpoints holds no checkpoint yet: the run starts from the beginning" in capsys.readouterr().err
    )


def _only_a_folder(run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True)


def _half_a_record(run: Path) -> None:
    _only_a_folder(run)
    (run / ".job.toml.writing").write_bytes(b"na")


@pytest.mark.parametrize("left", [_only_a_folder, _half_a_record])
@pytest.mark.parametrize("words", [[], ["--resume", "auto"], ["--overwrite"]], ids=str)
def test_an_attempt_that_was_killed_can_be_repeated(job: str, left: Callable[[Path], Any], words: list[str]) -> None:
    left(Path("runs/small"))
    assert train(*words, "--max-updates", "1") == 75
    (path,) = checkpoint_paths(Path("runs/small/checkpoints"))
    assert Checkpoint.from_bytes(path.read_bytes()).samples == 16
    assert not list(Path("runs").glob("*/.*"))


def test_overwrite_removes_what_a_killed_overwrite_left(stopped: Path) -> None:
    aside = stopped.with_name(".small.removed")
    shutil.copytree(stopped, aside)
    assert train("--overwrite", "--max-updates", "1") == 75
    assert not aside.exists()
    assert [path.name for path in checkpoint_paths(stopped / "checkpoints")] == ["samples-000000000000016.pt"]


def test_a_resume_reports_other_packages_and_changed_code(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert train("--resume", "auto", "--max-updates", "1") == 75
    error = capsys.readouterr().err
    assert "changed since" not in error
    assert "uncommitted changes" not in error
    record = json.loads((stopped / "record.json").read_text())
    last = record["attempts"][-1]
    now = last["packages"]["numpy"]
    last["packages"] |= {"numpy": "1.0", "timm": "0.1"}
    last["user_git_diff"] = "+ print()"
    last["python"] = "3.0"
    (stopped / "record.json").write_text(json.dumps(record))
    assert train("--resume", "auto", "--max-updates", "1") == 75
    error = capsys.readouterr().err
    assert f"changed since the last attempt: numpy was '1.0', is {now!r}" in error
    assert "changed since the last attempt: timm was '0.1', is " in error
    assert f"changed since the last attempt: Python was '3.0', is {platform.python_version()!r}" in error
    assert error.count("changed since the last attempt") == 3
    assert f"the git commit or uncommitted changes of {Path.cwd()} differ from those of the last attempt" in error
