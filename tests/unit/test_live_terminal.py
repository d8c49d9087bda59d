"""The live view on a real terminal: `train` and `watch` in processes that have a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hvd_batchgrow.comm.launcher_env import without_launcher
from hvd_batchgrow.results.run_summary import read_summary
from tests.helpers import enter_with_job, job_tree

pytestmark = pytest.mark.slow
CURSOR_HIDDEN, CURSOR_SHOWN = "\x1b[?25l", "\x1b[?25h"


def in_terminal(
    *words: str, columns: int = 80, on_output: Callable[[str, subprocess.Popen[bytes]], None] = lambda *_: None
) -> tuple[int, str]:
    """Run a command with a terminal for output; return its exit code, and the text that it wrote."""
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, "-m", "hvd_batchgrow.cli", *words]
    process = subprocess.Popen(command, stdout=its, stderr=its, env=environment | {"TERM": "xterm-256color"})
    os.close(its)
    found = b""
    with suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 65536):
            found += part
            on_output(found.decode(errors="ignore"), process)  # a character may be cut
    os.close(ours)
    return process.wait(60), found.decode()


def lines_of(text: str) -> list[str]:
    """Return the lines without the codes that style them and move the cursor."""
    return [line.rstrip("\r").rpartition("\r")[2] for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split("\n")]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    enter_with_job(tmp_path, job_tree("data", evaluation={"every_epochs": 0.5}), monkeypatch)
    return "job.toml"


def test_train_and_watch_show_a_live_view_and_leave_the_terminal_as_it_was(job: str) -> None:
    code, text = in_terminal("train", job, "--max-updates", "12", "--price", "2")
    assert code == 75
    lines = lines_of(text)
    for part in (
        "phase 1: global batch 16, lr 0.05",
        "phase 2: global batch 48, lr 0.05",
        "phase      2 of 4  lr 0.05  B 48 = 1 rank × 3 passes × 16",
    ):
        assert any(line.startswith(part) for line in lines)
    assert max(map(len, lines)) <= 80
    assert text.rindex(CURSOR_SHOWN) > text.rindex(CURSOR_HIDDEN)
    assert any(re.fullmatch(r"cost: 0\.\d\d = .* rank-hours × 2 per rank-hour", line) for line in lines)
    code, text = in_terminal("watch", "runs/small", columns=160)
    assert code == 75
    assert "to resume: hvd-batchgrow train runs/small/job.toml --runs-dir runs --resume auto" in text
    assert in_terminal("train", job, "--resume", "auto")[0] == 0
    code, text = in_terminal("watch", "runs/small")
    assert code == 0
    assert "runs/small: finished" in lines_of(text)
    assert "\x1b[3" not in text.replace("\x1b[3m", "")  # the end block has no colors


def test_an_error_shows_the_cursor_again(job: str) -> None:
    code, text = in_terminal("train", job, "--optim.lr", "1e30")
    assert code == 1
    assert text.rindex(CURSOR_SHOWN) > text.rindex(CURSOR_HIDDEN)
    assert "not finite" in " ".join(lines_of(text))


def test_ctrl_c_ends_watch_and_not_the_run(job: str) -> None:
    words = ["train", job, "--schedule.epochs", "400", "--schedule.boundaries-epochs", "[100.0]"]
    with Path("train.log").open("wb") as log:
        train = subprocess.Popen([sys.executable, "-m", "hvd_batchgrow.cli", *words], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while not (Path("runs/small/metrics.jsonl").exists() and Path("runs/small/metrics.jsonl").stat().st_size):
            assert train.poll() is None, Path("train.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.2)

        sent: list[int] = []

        def interrupt(text: str, process: subprocess.Popen[bytes]) -> None:
            if "trained by process" in text and not sent:  # a second one would end it at once
                sent.append(signal.SIGINT)
                process.send_signal(signal.SIGINT)

        code, text = in_terminal("watch", "runs/small", on_output=interrupt)
        assert code == 130
        assert "Traceback" not in text
        assert text.rindex(CURSOR_SHOWN) > text.rindex(CURSOR_HIDDEN)
        assert train.poll() is None
        assert read_summary(Path("runs/small")).state == "running"
    finally:
        train.terminate()
        train.wait(60)


def test_under_mpirun_there_are_plain_lines(job: str) -> None:
    if not any((Path(folder) / "mpirun").exists() for folder in os.environ["PATH"].split(":")):
        pytest.skip("mpirun is not installed")
    words = ["mpirun", "--oversubscribe", "-np", "1", sys.executable, "-m", "hvd_batchgrow.cli", "train", job]
    environment = without_launcher(os.environ)  # other tests in this process may have started MPI
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [*words, "--max-updates", "3"], capture_output=True, text=True, check=False, timeout=240, env=environment
    )
    assert "phase 1: global batch 16, lr 0.05" in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
