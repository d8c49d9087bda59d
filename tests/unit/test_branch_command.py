"""`branch` on a small run: same samples, one table, stops, kills and errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_summary import find_runs
from hvd_batchgrow.train.run.run_lock import RunLock
from hvd_batchgrow.verification.audit import audit, compare_orders, read_consumed
from hvd_batchgrow.verification.digest import compare_weights, final_weights
from tests.helpers import enter_copy, enter_with_job, job_tree

RUN = Path("runs/small")
BRANCH = ["branch", str(RUN), "--at", "160", "--factors", "1,2,4", "--samples", "3000", "--json"]
FOLDER = RUN / "branches/at-160-for-3072-linear"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of `small_job`: batches of 16, of 48 from sample 160, of 96 from 304 to 688."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("branch")
        enter_with_job(folder, job_tree("data", checkpoint={"every_epochs": 0.4, "keep": 1}), patch)
        assert main(["train", "job.toml"]) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    enter_copy(trained, tmp_path / "copy", monkeypatch)
    return RUN


@pytest.fixture(scope="module")
def branched(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with its branches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVD_BATCHGROW_CACHE", str(trained / "cache"))
        patch.chdir(shutil.copytree(trained, tmp_path_factory.mktemp("branched") / "copy"))
        assert main(BRANCH) == 0
        return Path.cwd()


def table(text: str) -> dict[str, Any]:
    """What `--json` prints, without times, which differ between invocations."""
    tree: dict[str, Any] = json.loads(text)
    for row in tree["branches"]:
        assert row.pop("seconds") > 0
    return tree


def attempts(run: Path) -> int:
    return len(json.loads((run / "record.json").read_text())["attempts"])


def again(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*BRANCH, *words]) == 0
    return table(capsys.readouterr().out)


@pytest.mark.slow
def test_all_branches_train_on_the_same_samples_and_leave_the_run_alone(
    branched: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(branched)
    consumed = [read_consumed(FOLDER / f"k{factor}") for factor in (1, 2, 4)]
    for factor, one in zip((1, 2, 4), consumed, strict=True):
        result = audit(one, lambda *_: None)
        assert result.passed
        assert one.bounds[one.bounds >= 160].tolist() == list(range(160, 3233, 48 * factor))
    for other in consumed[1:]:
        assert "the same samples in the same order up to 3,232" in compare_orders(consumed[0], other)[1]
    original = {path.relative_to(trained): path.read_bytes() for path in (trained / RUN).rglob("*") if path.is_file()}
    assert all((branched / path).read_bytes() == content for path, content in original.items())
    assert audit(read_consumed(RUN), lambda *_: None).passed
    assert find_runs(Path("runs")) == [RUN]


@pytest.mark.slow
def test_the_branch_of_the_runs_own_batch_does_the_updates_of_the_run(
    branched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(branched)
    run, branch = RunFiles.read(RUN), RunFiles.read(FOLDER / "k1")
    # The run logs 60 samples at a time: its first record after sample 160 has two updates of 48.
    of_run = dict(zip(run.column("samples").tolist(), run.column("loss").tolist(), strict=True))
    of_branch = dict(zip(branch.column("samples").tolist(), branch.column("loss").tolist(), strict=True))
    after = min(samples for samples in of_run if samples > 160)
    same = [loss for samples, loss in of_branch.items() if 160 < samples <= after]
    assert sum(same) / len(same) == pytest.approx(of_run[after], rel=1e-6)


@pytest.mark.slow
def test_the_table_is_of_the_records_and_is_printed_again_without_training(
    branched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(branched)
    stamps = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*.json*")}
    found = again(capsys)
    assert {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*.json*")} == stamps
    assert (found["global_batch"], found["branch_samples"], found["block"]) == (48, 3072, 192)
    rows = found["branches"]
    assert [(row["factor"], row["global_batch"], row["updates"]) for row in rows] == [
        (1, 48, 64),
        (2, 96, 32),
        (4, 192, 16),
    ]
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.1, 0.2])
    losses = RunFiles.read(FOLDER / "k2").column("loss")[-16:]
    assert rows[1]["loss"] == pytest.approx(losses.mean())
    assert rows[1]["difference"]["mean"] == pytest.approx(rows[1]["loss"] - rows[0]["loss"])
    for row in rows[1:]:
        change = row["held_out_loss"] - rows[0]["held_out_loss"]
        assert row["held_out_difference"]["mean"] == pytest.approx(change, abs=1e-5)
        assert row["held_out_difference"]["low"] < change < row["held_out_difference"]["high"]
    assert found["verdict"].startswith("critical batch: ")
    assert again(capsys, "--tolerance", "1000")["critical_batch"] == 192
    assert main(BRANCH[:-1]) == 0
    printed = capsys.readouterr().out
    assert "updates\n" not in printed
    assert f"{rows[2]['difference']['mean']:+.4f} ±" in printed
    assert printed.splitlines()[-1].startswith("critical batch: ")


@pytest.mark.slow
def test_a_stopped_command_resumes_and_ends_with_the_same_table(
    branched: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class StopsAfter40:
        looks = 0

        def __enter__(self) -> StopsAfter40:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @property
        def stop_requested(self) -> bool:
            self.looks += 1
            return self.looks > 40

    unfinished = Path("unfinished").absolute()
    monkeypatch.setenv("HVD_BATCHGROW_UNFINISHED", str(unfinished))
    with monkeypatch.context() as patch:
        patch.setattr("hvd_batchgrow.train.liveness.stop.StopRequest", StopsAfter40)
        codes = [main(BRANCH), main(BRANCH)]
    assert codes == [75, 75]
    assert unfinished.exists()
    parts = FOLDER.absolute()
    found = again(capsys)
    assert not unfinished.exists()
    assert attempts(FOLDER / "k1") + attempts(FOLDER / "k2") == 4  # both stops were within a branch
    monkeypatch.chdir(branched)
    assert again(capsys) == found
    for name in ("k1", "k2", "k4"):
        assert compare_weights(final_weights(parts / name), final_weights(FOLDER / name)) == "bit-identical"


@pytest.mark.slow
def test_branches_that_are_trained_one_by_one_have_the_same_table(
    branched: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = BRANCH[:-1]
    for factor in ("4", "1"):
        assert main([*options, "--only", factor]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) == ["k1", "k4"]
    assert main([*options, "--table"]) == 1
    assert "k = 2 has not begun" in capsys.readouterr().err
    assert main([*options, "--only", "2"]) == 0
    assert main([*options, "--only", "4"]) == 0
    assert "k4 is trained already" in capsys.readouterr().err
    assert attempts(FOLDER / "k4") == 1
    (RUN / "checkpoints/samples-000000000000160.pt").unlink()  # as a run does that is still training
    assert main([*options, "--table"]) == 0
    assert (FOLDER / "table.txt").read_text() == capsys.readouterr().out
    found = table((FOLDER / "table.json").read_text())
    monkeypatch.chdir(branched)
    assert again(capsys) == found


def test_a_branch_that_another_process_trains_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(FOLDER / "k2")
    lock.take()
    with lock:
        assert main([*BRANCH[:-1], "--only", "2"]) == 1
    assert f"{FOLDER}/k2 is being written by another job: process {os.getpid()} on " in capsys.readouterr().err
    assert not (FOLDER / "k2").exists()


@pytest.mark.slow
def test_a_killed_command_resumes_and_ends_with_the_same_table(
    branched: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "hvd_batchgrow.cli", *BRANCH]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    seen, updates = FOLDER / "k2" / "metrics.jsonl", 0
    while updates < 8 and process.poll() is None:
        time.sleep(0.005)
        if seen.exists():
            updates = sum('"global_batch": 96' in line for line in seen.read_text().splitlines()) - 4
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (FOLDER / "k4").exists()
    found = again(capsys)
    assert [attempts(FOLDER / name) for name in ("k1", "k2", "k4")] == [1, 2, 1]
    monkeypatch.chdir(branched)
    assert again(capsys) == found


def test_the_cost_is_known_beforehand(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BRANCH, "--dry-run"]) == 0
    rows = json.loads(capsys.readouterr().out)["branches"]
    assert [row["num_updates"] for row in rows] == [64, 32, 16]
    assert all(row["rank_hours"] == pytest.approx(row["seconds"] / 3600) for row in rows)
    assert rows[0]["seconds"] >= rows[1]["seconds"] >= rows[2]["seconds"] > 0  # fewer updates are never slower
    assert not (here / "branches").exists()
    assert main([*BRANCH[:-1], "--dry-run", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "3,000 rounded up to 16 blocks of 192" in printed
    assert "ε k (--lr-rule linear)" in printed


def test_the_cost_of_a_run_without_step_times_is_unknown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "metrics.jsonl").unlink()
    assert main([*BRANCH[:-1], "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "unknown" in printed
    assert "the run has no step times on record; --cost PROBE.json predicts them" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--at", "161"],
            "--at: runs/small has no checkpoint at sample 161 before its end; there are checkpoints at 160,",
        ),
        (["--at", "688"], "no checkpoint at sample 688 before its end"),
        (["--at", "160", "--factors", "2,4"], "--factors: must be distinct whole numbers >= 1, including 1"),
        (["--at", "160", "--factors", "1,two"], "--factors: must be whole numbers such as 1,2,4,8, got '1,two'"),
        (["--at", "160", "--samples", "100"], "--samples: 100 make 1 block of 384 samples, too few for an interval"),
        (["--at", "160", "--dry-run", "--ranks", "5"], "5 ranks × 1.20 ghost batches of 8; nearest: 40, 80"),
        (["--at", "304"], "--factors: 4 · 96: 384 must be below N = 300"),
        (["--ranks", "2"], "--ranks: is for --dry-run"),
        (["--optim.lr", "0.2"], "optim.lr: this command reads no job file"),
    ],
)
def test_impossible_requests_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["branch", str(here), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (here / "branches").exists()


def test_the_newest_checkpoint_before_the_end_is_the_default(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["branch", str(here), "--factors", "1,2,3", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 496  # of the phase that ends there; the run ends at 688
    assert main(["branch", str(here), "--factors", "1,2,3", "--dry-run"]) == 0
    # 32 blocks of 6 × 96 samples are many epochs of 300
    assert "half an epoch is less than 32 blocks here: smaller --factors, or a smaller batch" in capsys.readouterr().out


def test_a_folder_without_a_run_or_without_checkpoints_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["branch", "runs/smal"]) == 1
    assert "runs/smal does not hold a run; did you mean runs/small?" in capsys.readouterr().err
    for path in (here / "checkpoints").iterdir():
        path.unlink()
    assert main(["branch", str(here)]) == 1
    assert "holds no checkpoint before its end at sample 688: nothing to branch from" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_reported_with_the_others(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "checkpoints/samples-000000000000160.pt").write_bytes(b"damaged")
    assert main(BRANCH) == 1
    error = capsys.readouterr().err
    assert "samples-000000000000160.pt cannot be used: " in error
    assert "checkpoints exist at 304, 496" in error
    assert not (FOLDER / "k1").exists()


@pytest.mark.slow
def test_damaged_or_foreign_branches_are_reported(
    branched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shutil.copytree(branched, tmp_path / "copy"))
    metrics = FOLDER / "k2/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    spoilt = json.loads(lines[-2]) | {"loss": None}
    metrics.write_text("".join([*lines[:-2], json.dumps(spoilt) + "\n", lines[-1]]))
    assert again(capsys)["branches"][1]["difference"] is None  # as if the update was skipped
    metrics.write_text("".join([*lines[:-2], lines[-1]]))
    assert main(BRANCH) == 1
    assert "k2/metrics.jsonl holds records of 31 of 32 updates: remove " in capsys.readouterr().err
    job = (RUN / "job.toml").read_text()
    (RUN / "job.toml").write_text(job.replace("momentum = 0.9", "momentum = 0.8"))
    assert main(BRANCH) == 1
    assert "k1 was trained with another optim.momentum: remove it, and run branch again" in capsys.readouterr().err
