"""Ranks that stall, as real processes: named within a tenth of the timeout, and the job ends by itself after it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from tests.helpers import job_tree, small_source, write_idx_folder
from tests.launch.test_forms import ENVIRONMENT, FORMS, OPTIONS, captured, command, write_program
from tests.storm.attempts import numbered_ranks

TIMEOUT_S = 6.0
RARELY = ["--checkpoint.every-epochs", "1e6"]
"""Who waits for a busy disk makes no progress either."""
ENDLESS = ["--schedule.epochs", "20000", "--logging.stall-timeout-s", str(TIMEOUT_S), *RARELY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stall")
    (folder / "small.toml").write_text(tomli_w.dumps(job_tree(write_idx_folder(folder / "data", small_source()))))
    return folder


def wait_until(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


@contextlib.contextmanager
def started(words: list[str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job, of which nothing is left afterwards, whatever the test makes of it."""
    with log.open("wb") as file:
        process = subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, stdout=file, stderr=file)
    try:
        yield process
    finally:
        for rank in [*numbered_ranks(process.pid).values(), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        process.wait()


def runs(process: int) -> bool:
    """A zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("victim", [1, 0])
@pytest.mark.parametrize("form", ["mpirun", "horovodrun-gloo", "mpirun-torch"])
def test_a_rank_that_is_stopped_is_named_and_the_job_ends(folder: Path, form: str, victim: int) -> None:
    name = f"{form}-{victim}"
    log = folder / f"{name}.log"
    with started(command(form, "train", "small.toml", "--name", name, *ENDLESS), folder, log) as process:
        wait_until("epoch 1.", log, process)
        ranks = numbered_ranks(process.pid)
        assert list(ranks) == [0, 1]
        begin = time.monotonic()
        os.kill(ranks[victim], signal.SIGSTOP)
        code = process.wait(60)
        took_s = time.monotonic() - begin
    report = log.read_text()
    assert code != 0
    assert took_s >= TIMEOUT_S
    silent = (
        rf"rank {1 - victim}: no progress for 6 s, logging.stall_timeout_s; ending: rank {victim} of 2 on \S+ has been "
    )
    assert re.search(silent + r"silent for [\d.]+ s \(stopped, or its host is down\); its last stage: \w+", report), (
        report
    )
    while any(map(runs, ranks.values())):
        assert time.monotonic() - begin < 60, "a rank is left behind"
        time.sleep(0.1)


@pytest.mark.parametrize("form", ["mpirun", "horovodrun-gloo"])
def test_a_rank_that_hangs_is_named_with_what_it_does(folder: Path, form: str) -> None:
    stuck = write_program(
        folder,
        "stuck",
        "from hvd_batchgrow.data.pipeline.reader import Reader",
        "training = Reader.training",
        "def hang(self, stream, group, first, every, *args, **keys):",
        "    for index, batch in enumerate(training(self, stream, group, first, every, *args, **keys)):",
        "        if first % every == 1 and index == 40:",
        "            time.sleep(600)",
        "        yield batch",
        "Reader.training = hang",
    )
    words = [*FORMS[form], sys.executable, str(stuck), "train", "small.toml", "--name", f"stuck-{form}", *ENDLESS]
    done = captured([*words, *OPTIONS.get(form, [])], folder)
    report = done.stdout + done.stderr
    assert done.returncode != 0
    named = r"rank 0: no progress for 6 s, logging.stall_timeout_s; ending: rank 1 of 2 on \S+ is reading samples"
    assert re.search(named, report), report


def test_a_job_that_is_suspended_as_a_whole_continues(folder: Path) -> None:
    log = folder / "suspended.log"
    words = [
        "train",
        "small.toml",
        "--name",
        "suspended",
        "--schedule.epochs",
        "30",
        "--logging.stall-timeout-s",
        "4",
        *RARELY,
    ]
    with started(command("one", *words), folder, log) as process:
        wait_until("epoch 1.", log, process)
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == 0, log.read_text()


@pytest.mark.parametrize(
    ("form", "times", "code"), [("one", 1, 75), ("one", 2, 130), ("mpirun", 2, 130), ("horovodrun-gloo", 2, 1)]
)
def test_one_interrupt_saves_and_a_second_ends_at_once(folder: Path, form: str, times: int, code: int) -> None:
    # Rank 0 of two waits for the other inside Horovod, where no handler runs.
    slow = write_program(
        folder,
        "slow",
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)",  # which `nohup … &` takes away
        *("from hvd_batchgrow.train.update.engine import UpdateEngine", "update = UpdateEngine.update"),
        "def slowly(self, *arguments, **options):",
        "    if self.ranks.rank == 0:",
        "        print('updating', flush=True, file=sys.stderr)",
        f"    if self.ranks.rank == self.ranks.size - 1: time.sleep({2 if times == 1 else 300})",
        "    return update(self, *arguments, **options)",
        "UpdateEngine.update = slowly",
    )
    name = f"slow-{form}-{times}"
    log = folder / f"{name}.log"
    words = [*FORMS[form], sys.executable, str(slow), "train", "small.toml", "--name", name]
    with started(words, folder, log) as process:
        wait_until("updating", log, process)
        time.sleep(0 if form == "one" else 2)
        rank = process.pid if form == "one" else numbered_ranks(process.pid)[0]
        os.kill(rank, signal.SIGINT)
        if times == 2:
            wait_until("interrupted: ", log, process)
            os.kill(rank, signal.SIGINT)
        assert process.wait(60) == code, log.read_text()
    report = log.read_text()
    assert report.count("hvd-batchgrow: interrupted: stops at the next update, with a checkpoint") == 1
    assert report.count("hvd-batchgrow: interrupted again: ended at once") == times - 1
    # horovodrun uses its own exit code for every failure.
    assert report.count("Traceback") == (1 if form == "horovodrun-gloo" else 0), report
    checkpoints = list((folder / "runs" / name / "checkpoints").glob("samples-*"))
    assert len(checkpoints) == (1 if times == 1 else 0)
