"""A disk that fails in the midst of a run: the run ends with 1, says what and why, and the last checkpoint is good."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths, newest_good
from hvd_batchgrow.train.checkpoints.writer import CheckpointWriter
from tests.storm.attempts import Forked
from tests.storm.nursery import Nursery
from tests.storm.storm import write_job


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on its own file system of 2 MB."""
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"no disk can be mounted: {done.stderr if done else 'not root'}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filling").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def make_read_only(folder: Path) -> None:
    command = ["mount", "-o", "remount,ro", str(folder)]
    deadline = time.monotonic() + 30
    # While the run has a file open for writing, it is busy.
    while subprocess.run(command, check=False, capture_output=True).returncode:
        assert time.monotonic() < deadline


def remove_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


CHECKPOINT = r"checkpoint runs/small/checkpoints/samples-\d+\.pt could not"
TROUBLES: dict[Callable[[Path], None], str] = {
    fill: rf"({CHECKPOINT}|runs/small/\w+\.jsonl cannot) be written: No space left on device",
    make_read_only: r"be written: Read-only file system",
    remove_checkpoints: rf"{CHECKPOINT} be written: No such file or directory",
}


def end_by(trouble: Callable[[Path], None], run: Path, attempt: Forked, log: Path, message: str) -> None:
    """Make trouble after the first checkpoint, and check that the run ends with a message."""
    deadline = time.monotonic() + 300
    while not ((run / "metrics.jsonl").exists() and checkpoint_paths(run / "checkpoints")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    trouble(run)
    code = None
    while code is None and time.monotonic() < deadline:
        code = attempt.wait(0.2)
    attempt.end()
    report = log.read_text()
    assert code == 1, report
    assert re.search(message, report), report
    assert "Traceback" not in report


@pytest.mark.parametrize("trouble", list(TROUBLES))
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_trouble_with_the_disk_in_mid_run(
    disk: Path, tmp_path: Path, nursery: Nursery, num_ranks: int, trouble: Callable[[Path], None]
) -> None:
    write_job(tmp_path)
    words = ["train", "small.toml", "--resume", "auto", "--layout.exact", "true"]
    attempt = Forked(nursery, num_ranks, [*words, "--schedule.epochs", "2000"], "", tmp_path)
    end_by(trouble, disk, attempt, tmp_path / "log", TROUBLES[trouble])
    if trouble is not remove_checkpoints:
        checkpoint, skipped = newest_good(disk / "checkpoints")
        assert checkpoint is not None
        assert skipped == []
        assert not list((disk / "checkpoints").glob(".*"))


def test_a_full_disk_is_called_so_though_torch_does_not(disk: Path) -> None:
    def checkpoint(samples: int, size: int) -> Checkpoint:
        return Checkpoint(samples, {}, {"w": torch.zeros(size)}, {"state": {}, "param_groups": []}, 0.0, {}, {}, {}, 0)

    (disk / "checkpoints").mkdir()
    writer = CheckpointWriter(disk / "checkpoints", 1, ())
    writer.save(checkpoint(10, 1000))
    writer.save(checkpoint(20, 1_000_000))
    with pytest.raises(RunError, match=r"samples-000000000000020.pt could not be written: No space left on device"):
        writer.wait()
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["samples-000000000000010.pt"]
    writer.save(checkpoint(30, 1000))
    writer.wait()
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["samples-000000000000030.pt"]


def move_away(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def remove(run: Path) -> None:
    """Delete a folder as `rm -r` does, file by file, while the run continues."""
    for name in ("consumed.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    while run.exists():
        shutil.rmtree(run, ignore_errors=True)


def remove_a_record(run: Path) -> None:
    (run / "consumed.jsonl").unlink()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("trouble", [move_away, remove, remove_a_record])
def test_a_run_folder_that_is_removed_in_mid_run(
    tmp_path: Path, nursery: Nursery, trouble: Callable[[Path], None], num_ranks: int
) -> None:
    write_job(tmp_path)
    attempt = Forked(nursery, num_ranks, ["train", "small.toml", "--schedule.epochs", "2000"], "", tmp_path)
    run = tmp_path / "runs" / "small"
    end_by(trouble, run, attempt, tmp_path / "log", r"runs/small/\S+ (cannot|could not) be written: No such file")
    assert not (run / "consumed.jsonl").exists(), "rebuilt without its first lines"
    assert run.exists() == (trouble is remove_a_record)
