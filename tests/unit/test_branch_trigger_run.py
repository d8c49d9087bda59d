"""A finished run with the trigger `branch`: what the commands say of it, and a kill while it trains a branch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.results.run_cost import RunCost
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_summary import find_runs
from hvd_batchgrow.train.checkpoints.checkpoint import checkpoint_at
from hvd_batchgrow.verification.digest import compare_weights, final_weights
from tests.helpers import enter_copy, enter_with_job, enter_with_job_of, measured_tree

pytestmark = pytest.mark.slow

RUN = Path("runs/small")
BRANCHES = RUN / "branches/at-304-for-512-linear"
TRIGGER: dict[str, Any] = {"name": "branch", "factors": [1, 2], "branch_samples": 512, "tolerance": 1000.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that branches at sample 304, where it grows from 16 to 32, stopped at sample 656."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("branch-trigger")
        sections = {"schedule": {"epochs": 36.0, "lr_rule": "linear"}, "evaluation": {"every_epochs": 0.5}}
        enter_with_job(folder, measured_tree("data", TRIGGER, **sections), patch)
        assert main(["train", "job.toml", "--max-updates", "30"]) == 75
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    enter_copy(trained, tmp_path / "copy", monkeypatch)
    return RUN


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(list(words)) == code
    return capsys.readouterr().out


def test_a_kill_within_a_branch_resumes_to_the_same_decision_and_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_with_job_of(trained, tmp_path, monkeypatch)
    command = [sys.executable, "-m", "hvd_batchgrow.cli", "train", "job.toml"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    seen, updates = BRANCHES / "k2/consumed.jsonl", 0
    while updates < 3 and process.poll() is None:
        time.sleep(0.005)
        if seen.exists():
            updates = sum('"global_batch": 32' in line for line in seen.read_text().splitlines())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (RUN / "decisions.jsonl").exists()
    assert main(["train", "job.toml", "--resume", "auto", "--max-updates", "11"]) == 75
    attempts = [len(json.loads((BRANCHES / name / "record.json").read_text())["attempts"]) for name in ("k1", "k2")]
    assert attempts == [1, 2]
    assert (RUN / "decisions.jsonl").read_text() == (trained / RUN / "decisions.jsonl").read_text()
    assert compare_weights(final_weights(RUN), final_weights(trained / RUN)) == "bit-identical"
    assert main(["audit", str(RUN)]) == 0


def test_the_commands_see_one_run_whose_branches_are_its_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_runs(Path("runs")) == [RUN]
    assert "small" in printed(capsys, "list", "runs")
    assert ", branches " in printed(capsys, "show", str(RUN))
    assert "passed" in printed(capsys, "audit", str(RUN))
    assert json.loads(printed(capsys, "show", str(RUN), "--json"))["account"]["branches_s"] > 0
    plan = json.loads(printed(capsys, "plan", "job.toml", "--replay", str(RUN / "decisions.jsonl"), "--json"))
    assert [phase["global_batch"] for phase in plan["phases"]] == [16, 32]
    assert [phase["lr"] for phase in plan["phases"]] == pytest.approx([0.05, 0.1])
    assert [phase["global_batch"] for phase in plan["twin"]["phases"]] == [16, 16]
    assert main(["report", str(RUN)]) == 0


def test_the_command_branch_refuses_what_another_batch_has_trained(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["branch", str(RUN), "--at", "304", "--factors", "1,2", "--samples", "512"]
    # At sample 304 the batch has grown: 2 branches of 16 blocks of 64 samples are others than those of the trigger.
    assert main(words) == 2
    assert "512 make 8 blocks of 64 samples, too few" in capsys.readouterr().err


def test_a_fork_has_the_record_of_branches_and_an_overwrite_removes_it(here: Path) -> None:
    original = RunCost.of(RunFiles.read(here))
    assert main(["train", "job.toml", "--fork", "forked", "--max-updates", "2"]) == 75
    assert not Path("runs/forked/branches").exists()
    # The defect: a fork seemed to know its batch without the branches of the run that it continues.
    fork = RunCost.of(RunFiles.read(Path("runs/forked")))
    assert (fork.updates, fork.branch_updates) == (original.updates + 2, original.branch_updates)
    assert fork.branch_updates == 512 / 16 + 512 / 32
    assert fork.seconds == pytest.approx(original.seconds, rel=0.2)
    assert (here / "branches").exists()
    assert main(["train", "job.toml", "--overwrite", "--max-updates", "2"]) == 75
    assert not (here / "branches").exists()
    assert (here / "branches.jsonl").read_text() == ""


def test_the_checkpoint_of_a_decision_has_no_results_of_the_statistics_before_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_with_job_of(trained, tmp_path, monkeypatch)
    # It evaluates at sample 304, grows there, and then re-estimates the running statistics.
    assert main(["train", "job.toml", "--model.precise-bn-samples", "32", "--max-updates", "20"]) == 75
    lines = map(json.loads, (RUN / "metrics.jsonl").read_text().splitlines())
    assert [line["samples"] for line in lines if line["kind"] == "eval"] == [160, 304]
    assert checkpoint_at(RUN / "checkpoints", 304).evaluation == {}
