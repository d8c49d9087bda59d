"""Growth by ranks as a user starts it: one, two and four of four ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomli_w

from hvd_batchgrow.verification.digest import final_weights
from tests.helpers import job_tree, small_source, write_idx_folder
from tests.launch.test_forms import BIN, ENVIRONMENT, TOOLS, captured, launched, write_slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    root = write_idx_folder(folder / "data", small_source())
    layout = {"grow_by": "ranks", "ranks_per_phase": [1, 2, 4, 4], "exact": True, "max_micro_batch": 8}
    (folder / "grow.toml").write_text(tomli_w.dumps(job_tree(root, layout=layout)))
    return folder


def train(folder: Path, ranks: int, *words: str, program: Sequence[str] = (str(BIN / "hvd-batchgrow"),)) -> list[str]:
    launcher = [str(TOOLS / "mpirun.sh"), str(ranks)] if ranks > 1 else []
    return [*launcher, *program, "train", str(folder / "grow.toml"), *words]


def run(folder: Path, ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    return captured(train(folder, ranks, *words), folder, 400)


@pytest.fixture(scope="module")
def digest(folder: Path) -> str:
    """Of the same schedule, grown by accumulation on one rank."""
    done = run(folder, 1, "--name", "alone", "--layout.grow_by", "accumulation", "--layout.ranks_per_phase", "[]")
    assert done.returncode == 0, done.stderr
    return final_weights(folder / "runs/alone").digest


def test_growing_ranks_end_with_the_bits_of_growing_accumulation(folder: Path, digest: str) -> None:
    done = run(folder, 4)
    assert done.returncode == 0, done.stderr
    assert final_weights(folder / "runs/small").digest == digest
    lines = [json.loads(line) for line in (folder / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert sorted({(line["phase"], line["ranks"]) for line in lines if line["kind"] == "train"}) == [
        (0, 1), (1, 2), (2, 4), (3, 4),
    ]  # fmt: skip
    assert "phase 2: global batch 48 on 2 of 4 ranks" in done.stdout + done.stderr


def test_a_signal_to_a_rank_that_waits_stops_the_run_and_it_resumes(folder: Path, digest: str) -> None:
    # A first phase of ten updates, a second each, so that there is time to find the process that waits.
    words = ("--name", "asked")
    slow = [sys.executable, str(write_slow(folder, 1.0))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with launched(train(folder, 4, *words, program=slow), cwd=folder, env=ENVIRONMENT, **pipes) as job:
        waiting = _rank(job.pid, 3)
        os.kill(waiting, signal.SIGUSR2)
        out, err = job.communicate(timeout=300)
    assert job.returncode == 75, out + err
    done = run(folder, 4, *words, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert final_weights(folder / "runs/asked").digest == digest


def _rank(launcher: int, rank: int, timeout_s: float = 300) -> int:
    """Process id of a rank below a launcher, once it catches USR2."""
    deadline = time.monotonic() + timeout_s
    wanted = f"OMPI_COMM_WORLD_RANK={rank}\0".encode()
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = wanted in (path / "environ").read_bytes() and b"grow.toml" in (path / "cmdline").read_bytes()
                caught = int((path / "status").read_text().split("SigCgt:")[1].split()[0], 16)
                parents = _parents(int(path.name)) if is_ours else []
            except (OSError, IndexError):
                continue
            if launcher in parents and caught >> (signal.SIGUSR2 - 1) & 1:
                return int(path.name)
        time.sleep(0.05)
    raise AssertionError(f"no rank {rank} below {launcher}")


def _parents(pid: int) -> list[int]:
    parents = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        parents.append(pid)
    return parents
