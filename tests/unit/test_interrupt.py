"""Ctrl-C at any stage of any command: one line, code 130, nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd_batchgrow.interrupt import uninterrupted
from hvd_batchgrow.train.liveness.stop import StopRequest

LISTENS = "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
"""First lines of a process that may ignore SIGINT, as these tests do under `nohup … &`."""


def interrupted(words: list[str], stage: str, *, cwd: Path) -> tuple[int, str]:
    """Run a command that receives SIGINT when it imports a module; return its exit code and stderr."""
    code = (
        f"{LISTENS}\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {stage!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from hvd_batchgrow.cli import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], check=False, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "stage"),
    [
        (["plan"], "pydantic"),
        (["plan"], "tomli_w"),
        (["probe"], "torch"),
        (["verify"], "hvd_batchgrow.verification.verify"),
        (["submit", "--nodes-max", "1", "--dry-run"], "hvd_batchgrow.schedule.cost.probe_file"),
        (["train"], "tyro"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_interrupt_prints_one_line(job: str, tmp_path: Path, command: list[str], stage: str) -> None:
    name, *options = command
    assert interrupted([name, job, *options], stage, cwd=tmp_path) == (130, "hvd-batchgrow: interrupted\n")


@pytest.mark.slow
def test_an_interrupt_of_verify_ends_its_child_processes(job: str, tmp_path: Path) -> None:
    code = f"{LISTENS}\nfrom hvd_batchgrow.cli import main\nsys.exit(main())"
    words = [sys.executable, "-c", code, "verify", job, "--layouts", "1x1x16", "--updates", "10000"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (started := children.read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr
        message = process.stderr.read()
    assert message.endswith("hvd-batchgrow: interrupted\n")
    assert "Traceback" not in message
    assert not any(Path("/proc", child).exists() for child in started)


@pytest.mark.slow
def test_a_second_interrupt_ends_a_process_whose_stderr_is_a_closed_pipe(tmp_path: Path) -> None:
    """The defect: the thread that should have ended it died when it could not write its message."""
    code = (
        f"{LISTENS}\n"
        "from hvd_batchgrow.train.liveness.stop import StopRequest\n"
        "import time\n"
        "with StopRequest():\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.5)\n"
        "    time.sleep(5)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, stderr=writer, timeout=300)
    finally:
        os.close(writer)
    assert done.returncode == 130


def test_uninterrupted_delays_an_interrupt() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("started")
        done.append("more")
    except KeyboardInterrupt:
        done.append("interrupted")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["started", "interrupted"]


def test_a_stop_request_leaves_an_ignored_interrupt_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.stop_requested
            signal.raise_signal(signal.SIGUSR2)
            assert stop.stop_requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
