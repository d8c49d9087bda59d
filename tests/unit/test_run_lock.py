"""Locks of a run on file systems without shared locks, or without any."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.run.run_lock import RunLock

OTHER = "process 12 on elsewhere\nmachine 0000 beat 0\n"
"""The mark of a process on another machine."""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    error = (
        rf"^{tmp_path} has no file locks \({os.strerror(number)}\), so two jobs could write to one run: choose another"
    )
    with RunLock(tmp_path / "run") as lock, pytest.raises(RunError, match=error):
        lock.take()


def test_a_holder_whose_lock_was_taken_over_ends(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    program = (
        "import sys, time; from pathlib import Path; from hvd_batchgrow.train.run import run_lock\n"
        "run_lock.BEAT_S = 0.05; run_lock.RunLock(Path(sys.argv[1])).take(); print('taken', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"taken\n"
        holder.send_signal(signal.SIGSTOP)  # the holder is suspended, and a process elsewhere takes the run
        (folder.parent / ".run.lock").write_text(OTHER)
        holder.send_signal(signal.SIGCONT)
        error = holder.communicate(timeout=50)[1].decode()
        assert holder.returncode == 1
    assert error == (
        f"{folder}: this process was suspended, and the run was taken over by process 12 on elsewhere: ended at once\n"
    )
    mark = (folder.parent / ".run.lock").read_text()
    assert mark == OTHER


def test_a_holder_whose_lock_was_taken_over_leaves_the_mark_of_the_other(tmp_path: Path) -> None:
    with RunLock(tmp_path / "runs/run") as lock:
        lock.take()
        (tmp_path / "runs/.run.lock").write_text(OTHER)
    assert (tmp_path / "runs/.run.lock").read_text() == OTHER
