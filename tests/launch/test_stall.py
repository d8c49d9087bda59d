"""Ranks that stall, as real processes: named within a tenth of the timeout, and the job ends by itself after it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from tests.helpers import job_tree, small_source, write_idx_folder
from tests.launch.test_forms import ENVIRONMENT, FORMS, OPTIONS, command, ranks_of

TIMEOUT_S = 6.0
ENDLESS = ["--schedule.epochs", "20000", "--watch.stall-timeout-s", str(TIMEOUT_S)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stall")
    (folder / "small.toml").write_text(tomli_w.dumps(job_tree(write_idx_folder(folder / "data", small_source()))))
    return folder


def wait_until(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


def rank_number(process: int) -> int:
    environment = Path(f"/proc/{process}/environ").read_text().split("\0")
    numbers = dict(entry.partition("=")[::2] for entry in environment)
    names = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK")
    return int(next(numbers[name] for name in names if name in numbers))


@pytest.mark.parametrize("victim", [1, 0])
@pytest.mark.parametrize("form", ["mpirun", "horovodrun-gloo", "mpirun-torch"])
def test_a_rank_that_is_stopped_is_named_and_the_job_ends(folder: Path, form: str, victim: int) -> None:
    name = f"{form}-{victim}"
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        words = command(form, "train", "small.toml", "--name", name, *ENDLESS)
        process = subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, stdout=file, stderr=file)
    wait_until("epoch 1.", log, process)
    ranks = {rank_number(rank): rank for rank in ranks_of(process.pid)}
    assert sorted(ranks) == [0, 1]
    begin = time.monotonic()
    os.kill(ranks[victim], signal.SIGSTOP)
    wait_until("no progress for", log, process)
    assert time.monotonic() - begin < TIMEOUT_S, "it is to be reported long before the end"
    code = process.wait(timeout=60)
    took_s = time.monotonic() - begin
    told = log.read_text()
    assert code != 0
    assert took_s >= TIMEOUT_S
    silent = (
        rf"rank {1 - victim}: no progress for 6 s, watch.stall_timeout_s; ending: rank {victim} of 2 on \S+ has been "
    )
    assert re.search(silent + r"silent for [\d.]+ s \(stopped, or its host is gone\); it was last \w+", told), told
    assert not [rank for rank in ranks.values() if Path(f"/proc/{rank}").exists()], "a rank is left behind"


@pytest.mark.parametrize("form", ["mpirun", "horovodrun-gloo"])
def test_a_rank_that_hangs_is_named_with_what_it_does(folder: Path, form: str) -> None:
    stuck = folder / "stuck.py"
    stuck.write_text(
        "import sys, time\n"
        "from hvd_batchgrow.cli import main\n"
        "from hvd_batchgrow.data.pipeline import Reader\n"
        "training = Reader.training\n"
        "def hang(self, stream, group, first, every):\n"
        "    for index, batch in enumerate(training(self, stream, group, first, every)):\n"
        "        if first % every == 1 and index == 40:\n"
        "            time.sleep(600)\n"
        "        yield batch\n"
        "Reader.training = hang\n"
        "sys.exit(main())\n"
    )
    words = [*FORMS[form], sys.executable, str(stuck), "train", "small.toml", "--name", f"stuck-{form}", *ENDLESS]
    done = subprocess.run(
        [*words, *OPTIONS.get(form, [])],
        check=False,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = done.stdout + done.stderr
    assert done.returncode != 0
    named = r"rank 0: no progress for 6 s, watch.stall_timeout_s; ending: rank 1 of 2 on \S+ is reading samples"
    assert re.search(named, told), told


def test_a_job_that_is_suspended_as_a_whole_goes_on(folder: Path) -> None:
    log = folder / "suspended.log"
    words = command("one", "train", "small.toml", "--name", "suspended", "--schedule.epochs", "200")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*words, "--watch.stall-timeout-s", "1"], cwd=folder, env=ENVIRONMENT, stdout=file, stderr=file
        )
    wait_until("epoch 1.", log, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=120) == 0, log.read_text()


@pytest.mark.parametrize(("times", "code"), [(1, 75), (2, 1)])
def test_one_interrupt_saves_and_a_second_ends_at_once(folder: Path, times: int, code: int) -> None:
    slow = folder / "slow.py"
    slow.write_text(
        "import sys, time\n"
        "from hvd_batchgrow.cli import main\n"
        "from hvd_batchgrow.train.engine import UpdateEngine\n"
        "update = UpdateEngine.update\n"
        "def slowly(self, *arguments, **options):\n"
        "    print('updating', flush=True, file=sys.stderr)\n"
        "    time.sleep(2)\n"
        "    return update(self, *arguments, **options)\n"
        "UpdateEngine.update = slowly\n"
        "sys.exit(main())\n"
    )
    log = folder / f"slow-{times}.log"
    name = f"slow-{times}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(slow), "train", "small.toml", "--name", name],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=file,
            stderr=file,
        )
    wait_until("updating\nupdating", log, process)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    begin = time.monotonic()
    assert process.wait(timeout=60) == code, log.read_text()
    checkpoints = [path.name for path in (folder / "runs" / name / "checkpoints").iterdir()]
    # The one that was under way and, where it was not asked for before that had begun, one more.
    assert checkpoints == ([] if times == 2 else ["samples-000000000000048.pt"]) or len(checkpoints) == 1
    assert times == 1 or time.monotonic() - begin < 1.5, "it has waited for the update"
