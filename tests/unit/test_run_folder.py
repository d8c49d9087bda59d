from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_batchgrow.comm.hardware import Hardware, hardware_of
from hvd_batchgrow.comm.ranks import CollectiveError, SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.nn.ghost.ghost_choice import kernels_for_cpu
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, write_checkpoint
from hvd_batchgrow.train.run import run_folder, run_lock
from hvd_batchgrow.train.run.checkout import program_checkout
from hvd_batchgrow.train.run.run_folder import open_run, recorded_data
from hvd_batchgrow.train.run.run_lock import RunLock
from tests.helpers import NUM_TRAIN, small_job

EMPTY: dict[str, Any] = {"state": {}, "param_groups": []}
"""An optimizer before its first update."""
HARDWARE = Hardware("CPU", (0,), "")


def open_(
    folder: Path, job: Job, *, resume: bool = False, overwrite: bool = False
) -> tuple[Checkpoint | None, list[str]]:
    return open_run(
        folder, job, compile_plan(job, 1, NUM_TRAIN), SingleRank(), HARDWARE, resume=resume, overwrite=overwrite
    )


def save(folder: Path, job: Job, samples: int = 160, deciding: dict[str, Any] | None = None) -> None:
    deciding = deciding or job.deciding(NUM_TRAIN)
    write_checkpoint(folder / "checkpoints", Checkpoint(samples, deciding, {}, EMPTY, 1.0, {}, {}, {}, 0), 3, ())


def test_a_new_run_leaves_what_it_was_made_from(tmp_path: Path) -> None:
    job = small_job()
    assert open_(tmp_path / "run", job) == (None, [])
    assert parse_job(tomllib.loads((tmp_path / "run" / "job.toml").read_text())) == job
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan == compile_plan(job, 1, NUM_TRAIN).to_dict()
    (attempt,) = json.loads((tmp_path / "run" / "record.json").read_text())["attempts"]
    assert attempt["packages"]["torch"]
    assert attempt["ranks"] == 1
    assert Hardware(**{**attempt["hardware"], "gpus_per_host": (0,)}) == HARDWARE
    assert attempt["ghost_norm_on_cpu"] == kernels_for_cpu()


def test_a_resume_reports_other_ghost_norm_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernels, expected in (("C", []), ("PyTorch", ["was 'C', is 'PyTorch'"]), ("PyTorch", [])):
        monkeypatch.setattr("hvd_batchgrow.train.run.run_folder.kernels_for_cpu", lambda kernels=kernels: kernels)
        _, notes = open_(tmp_path / "run", small_job(), resume=True)
        save(tmp_path / "run", small_job())
        notes = [note for note in notes if "does not exist yet" not in note]  # the first attempt
        assert notes == [f"changed since the last attempt: ghost norms on a CPU {each}" for each in expected]


def test_a_run_is_resumed_only_on_data_that_means_the_same(tmp_path: Path) -> None:
    job, plan = small_job(), compile_plan(small_job(), 1, NUM_TRAIN)

    def open_with(schema: dict[str, Any]) -> None:
        open_run(tmp_path / "run", job, plan, SingleRank(), HARDWARE, resume=True, overwrite=False, schema=schema)

    schema = {
        "features": ["color=blue", "color=red"],
        "categories": {"color": ["blue", "red"]},
        "mean": [0.0, 100.0],
        "std": [1.0, 50.0],
        "targets_sha256": "a" * 64,
    }
    open_with(schema)
    save(tmp_path / "run", job)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["data"] == schema
    fault = r"trained on data with another meaning:\n  features: \['color=blue', 'color=red'\], now \['color=red'\]"
    with pytest.raises(CollectiveError, match=fault):
        open_with({**schema, "features": ["color=red"]})
    with pytest.raises(
        CollectiveError, match=r"on other data:\n  mean of 'color=blue': 0, now 0.5\n  restore the files"
    ):
        open_with({**schema, "mean": [0.5, 100.0]})
    with pytest.raises(CollectiveError, match=r"std of 'color=red': 50, now 51\n  the targets .*: a{12}…, now b{12}…"):
        open_with({**schema, "std": [1.0, 51.0], "targets_sha256": "b" * 64})
    open_with({**schema, "mean": [1e-7, 100.00001], "std": [1.000001, 50.0]})  # rounding on another machine
    old = json.loads((tmp_path / "run" / "record.json").read_text())
    (tmp_path / "run" / "record.json").write_text(json.dumps({**old, "data": {"classes": None}}))
    open_with({**schema, "classes": None})  # a run of a version that did not record mean and std


def test_a_run_of_an_older_version_is_resumed_with_the_defaults_of_new_data_keys(tmp_path: Path) -> None:
    job = small_job()
    open_(tmp_path / "run", job)
    old = {
        key: value for key, value in job.deciding(NUM_TRAIN).items() if key not in {"data.missing", "data.categorical"}
    }
    save(tmp_path / "run", job, deciding=old)
    assert open_(tmp_path / "run", job, resume=True)[0] is not None
    changed = small_job(data={"source": "csv", "missing": "zero", "crop_padding": 0, "hflip": False})
    with pytest.raises(CollectiveError, match=r"data.missing: was 'error', is 'zero'"):
        open_(tmp_path / "run", changed, resume=True)


def test_a_run_is_never_written_over_by_accident(tmp_path: Path) -> None:
    job = small_job()
    open_(tmp_path / "run", job)
    with pytest.raises(CollectiveError, match=r"holds a run already: add --resume auto .* --overwrite .* or --name"):
        open_(tmp_path / "run", job)
    save(tmp_path / "run", job)
    assert open_(tmp_path / "run", job, overwrite=True) == (None, [])
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_overwrite_does_not_remove_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(CollectiveError, match=r"is not a run folder"):
        open_(tmp_path / "run", small_job(), overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_resume_uses_the_newest_good_checkpoint_and_reports_skipped_ones(tmp_path: Path) -> None:
    job = small_job()
    assert open_(tmp_path / "run", job, resume=True) == (
        None,
        [f"{tmp_path / 'run'} does not exist yet: the run starts from the beginning"],
    )
    save(tmp_path / "run", job, 160)
    save(tmp_path / "run", job, 320)
    (tmp_path / "run" / "checkpoints" / "samples-000000000000320.pt").write_bytes(b"damaged")
    checkpoint, notes = open_(tmp_path / "run", job, resume=True)
    assert checkpoint is not None
    assert checkpoint.samples == 160
    assert len(notes) == 1
    assert "samples-000000000000320.pt: cut short" in notes[0]
    assert len(json.loads((tmp_path / "run" / "record.json").read_text())["attempts"]) == 2


def test_a_folder_where_a_checkpoint_will_be_written_is_reported_at_once(tmp_path: Path) -> None:
    job, run = small_job(), tmp_path / "run"
    open_(run, job)
    save(run, job)
    blocked = run / "checkpoints" / f"samples-{304:015d}.pt"
    blocked.mkdir()
    with pytest.raises(CollectiveError) as caught:
        open_(run, job, resume=True)
    assert str(caught.value.error) == (
        f"{blocked}: a folder where the run would write a checkpoint; move it away, and run this again"
    )
    blocked.rmdir()
    checkpoint, _ = open_(run, job, resume=True)
    assert checkpoint is not None


def test_a_job_that_would_lead_to_other_weights_cannot_resume(tmp_path: Path) -> None:
    job = small_job()
    open_(tmp_path / "run", job)
    save(tmp_path / "run", job)
    other = small_job(optim={"lr": 0.07}, schedule={"noise_factor": 2.0})
    with pytest.raises(CollectiveError) as caught:
        open_(tmp_path / "run", other, resume=True)
    assert "optim.lr: was 0.05, is 0.07\n  schedule.noise_factor: was 3.0, is 2.0" in str(caught.value)
    assert tomllib.loads((tmp_path / "run" / "job.toml").read_text())["optim"]["lr"] == 0.05, "left as it was"


def test_settings_that_do_not_affect_the_weights_may_change_at_a_resume(tmp_path: Path) -> None:
    job = small_job()
    open_(tmp_path / "run", job)
    save(tmp_path / "run", job)
    checkpoint, _ = open_(tmp_path / "run", small_job(layout={"max_micro_batch": 32}), resume=True)
    assert checkpoint is not None


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CollectiveError, match=r"file/run/checkpoints cannot be written: Not a directory"):
        open_(tmp_path / "file" / "run", small_job())


def test_a_link_to_a_run_has_the_lock_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "scratch" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "real")
    with RunLock(tmp_path / "scratch" / "real") as real, RunLock(tmp_path / "link") as link:
        real.take()
        with pytest.raises(RunError, match="is being written by another job: process"):
            link.take()


def test_two_jobs_cannot_write_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    with RunLock(folder) as first, RunLock(folder) as second:
        first.take()
        with pytest.raises(RunError, match=rf"run is being written by another job: process {os.getpid()} on "):
            second.take()
    with RunLock(folder) as third:
        third.take()


def _mark_of_another_machine(folder: Path, beat: int) -> None:
    path = folder.parent / f".{folder.name}.lock"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"process 12 on elsewhere\nmachine 0000 beat {beat}\n")


def test_a_live_holder_on_another_machine_is_found_even_without_shared_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    folder = tmp_path / "runs" / "run"
    _mark_of_another_machine(folder, 7)
    waits: list[str] = []

    def report(text: str, beat: int, *_: object) -> None:
        waits.append(text)
        if beat == 2:
            _mark_of_another_machine(folder, 8)

    with RunLock(folder) as lock, pytest.raises(RunError, match=r"written by another job: process 12 on elsewhere$"):
        lock.take(report)
    assert waits == ["waiting to see whether process 12 on elsewhere still runs"] * 3


def test_the_lock_of_a_dead_holder_on_another_machine_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    folder = tmp_path / "runs" / "run"
    _mark_of_another_machine(folder, 7)
    begin = time.monotonic()
    with RunLock(folder) as lock:
        lock.take()
        assert time.monotonic() - begin >= run_lock.NUM_BEATS * 0.05
        path = tmp_path / "runs" / ".run.lock"
        first = path.read_text()
        assert first.startswith(f"process {os.getpid()} on {socket.gethostname()}\n")
        deadline = time.monotonic() + 30
        while path.read_text() == first:
            assert time.monotonic() < deadline, "the new holder does not update its mark"
    assert path.read_text() == "", "the holder released the lock"


def test_the_lock_of_a_process_that_was_killed_is_free_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    program = (
        "import sys, time; from pathlib import Path; from hvd_batchgrow.train.run.run_lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).take(); print('taken', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"taken\n"
        with (
            RunLock(folder) as second,
            pytest.raises(RunError, match=rf"process {holder.pid} on {socket.gethostname()}$"),
        ):
            second.take()
        holder.kill()
    waits: list[str] = []
    with RunLock(folder) as third:
        third.take(lambda text, *_: waits.append(text))
    assert waits == []


def test_a_lock_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with RunLock(tmp_path / "file" / "run") as lock, pytest.raises(RunError, match=r"file cannot be written: File exi"):
        lock.take()


@pytest.mark.parametrize("text", ['{"attempts": [', '{"attempts": [[]]}', '{"attempts": 3}', "[" * 100_000])
def test_a_damaged_record_does_not_prevent_a_resume(tmp_path: Path, text: str) -> None:
    job = small_job()
    open_(tmp_path / "run", job)
    save(tmp_path / "run", job)
    (tmp_path / "run" / "record.json").write_text(text)
    checkpoint, notes = open_(tmp_path / "run", job, resume=True)
    assert checkpoint is not None
    assert re.search(r"record\.json is damaged: .*; a new record replaces it", notes[0])
    assert len(json.loads((tmp_path / "run" / "record.json").read_text())["attempts"]) == 1


def test_a_record_that_cannot_be_read_is_not_replaced(tmp_path: Path) -> None:
    job = small_job()
    open_(tmp_path / "run", job)
    save(tmp_path / "run", job)
    (tmp_path / "run" / "record.json").unlink()
    os.mkfifo(tmp_path / "run" / "record.json")
    with pytest.raises(CollectiveError, match=r"record\.json cannot be written: a pipe or device"):
        open_(tmp_path / "run", job, resume=True)


@pytest.mark.parametrize("text", ['{"attempts":' + "[" * 100_000, '{"attempts": [], "data": 3}', "[]"])
def test_nothing_is_known_of_the_data_in_a_damaged_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    assert recorded_data(tmp_path) == {}


def git(*words: str) -> str:
    """Run git in the working directory."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_record_has_the_commit_of_the_users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hardware = hardware_of(SingleRank(), torch.device("cpu"))
    job = small_job()
    record = run_folder._record(SingleRank(), hardware, job)
    assert (record["working_directory"], record["user_git_commit"]) == (str(tmp_path), None)
    git("init", "-q")
    (tmp_path / "mine.py").write_text("x = 1\n")
    git("add", "mine.py")
    git("commit", "-qm", "mine")
    (tmp_path / "mine.py").write_text("x = 2\n")
    record = run_folder._record(SingleRank(), hardware, job)
    assert record["user_git_commit"] == git("rev-parse", "HEAD") != record["git_commit"]
    assert "+x = 2" in record["user_git_diff"]


def test_an_installed_program_has_no_commit_even_inside_a_checkout_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    installed = tmp_path / "venv/lib/program.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("x = 1\n")
    assert program_checkout(installed) == (None, None)
    git("init", "-q")
    git("commit", "-qm", "mine", "--allow-empty")
    assert program_checkout(installed) == (None, None)
    git("add", "venv")
    git("commit", "-qm", "its own")
    installed.write_text("x = 2\n")
    commit, diff = program_checkout(installed)
    assert commit == git("rev-parse", "HEAD")
    assert diff is not None
    assert "+x = 2" in diff


def test_a_folder_that_can_only_be_emptied_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    open_(run, small_job())
    real = os.rmdir

    def rmdir(path: Any, **options: Any) -> None:
        # NFS keeps the name of a file that a process has open, so its folder cannot be removed.
        if str(path).endswith(".run.removed"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    open_(run, small_job(), overwrite=True)
    assert len(json.loads((run / "record.json").read_text())["attempts"]) == 1
