"""Ranks that come and go under horovodrun: whatever happens, the weights are those of one rank left alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from hvd_batchgrow.verification.audit import audit, read_consumed
from hvd_batchgrow.verification.digest import final_weights
from tests.helpers import job_tree, small_source, write_idx_folder
from tests.launch.test_forms import BIN, ENVIRONMENT, launched, write_slow

DISCOVER = Path(__file__).parents[2] / "slurm" / "discover-hosts.sh"
# A worker that dies bars its whole host: two names of this machine stand for two hosts.
FIRST, BOTH = "localhost:1\n", "localhost:1\n127.0.0.1:1\n"
PAUSE_S = 0.1
"""Before each update. Phase 2 lasts 8 s, and horovodrun looks for hosts once a second."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    root = write_idx_folder(folder / "data", small_source())
    schedule = {"epochs": 14.0, "boundaries_epochs": [2.0], "noise_factor": 3.0, "max_batch": 48}
    layout = {"exact": True, "max_micro_batch": 8, "grow_by": "ranks", "ranks_per_phase": [1, 2]}
    tree = job_tree(root, schedule=schedule, layout=layout, evaluation={"every_epochs": 1000.0})
    (folder / "job.toml").write_text(tomli_w.dumps(tree))
    write_slow(folder, PAUSE_S)
    return folder


@pytest.fixture(scope="module")
def digest(folder: Path) -> str:
    words = ("--name", "alone", "--layout.grow_by", "accumulation", "--layout.ranks_per_phase", "[]")
    command = [str(BIN / "hvd-batchgrow"), "train", str(folder / "job.toml"), *words]
    subprocess.run(command, check=True, cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=300)
    return final_weights(folder / "runs/alone").digest


def train(
    folder: Path,
    name: str,
    hosts: str,
    meanwhile: Callable[[], None],
    *words: str,
    follow_plan: bool = False,
    np: int = 0,
) -> str:
    """A run under elastic horovodrun, in which something happens after 20 updates; what it printed."""
    offer(folder, hosts)
    environment = ENVIRONMENT | {"HVD_BATCHGROW_HOSTS_FILE": "hosts"}
    if follow_plan:
        environment["HVD_BATCHGROW_RUN"] = f"runs/{name}"
    options = f"--gloo -np {np or len(hosts.split())} --min-np 1 --max-np 2 --network-interface lo".split()
    command = [str(BIN / "horovodrun"), *options, "--host-discovery-script", str(DISCOVER)]
    command += [sys.executable, "slow.py", "train", "job.toml", "--name", name, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with launched(command, cwd=folder, env=environment, **pipes) as job:
        consumed = folder / "runs" / name / "consumed.jsonl"
        deadline = time.monotonic() + 300
        while not consumed.exists() or len(consumed.read_bytes().splitlines()) < 20:
            assert time.monotonic() < deadline, "it does not begin"
            time.sleep(0.05)
        meanwhile()
        out, _ = job.communicate(timeout=400)
    assert job.returncode == 0, out
    return out


def offer(folder: Path, hosts: str) -> None:
    """From now on there are these hosts."""
    # At once: horovodrun would take a file that is half written for hosts that are gone.
    (folder / "hosts.new").write_text(hosts)
    (folder / "hosts.new").replace(folder / "hosts")


def strike(name: str, rank: int, number: signal.Signals) -> None:
    """A signal for a rank, as they were at first: of hosts, Horovod says which comes first by chance."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = f"\0--name\0{name}\0".encode() in (path / "cmdline").read_bytes()
            is_there = f"\0HOROVOD_RANK={rank}\0".encode() in (path / "environ").read_bytes()
            is_python = "python" in (path / "comm").read_text() or "hvd-batchgrow" in (path / "comm").read_text()
        except OSError:
            continue
        if is_rank and is_there and is_python:
            found.append(int(path.name))
    assert found, f"no rank {rank} of {name}"
    for pid in found:
        os.kill(pid, number)


def assert_undisturbed(folder: Path, name: str, digest: str) -> None:
    assert final_weights(folder / "runs" / name).digest == digest
    assert audit(read_consumed(folder / "runs" / name), lambda *_: None).passed


def test_a_rank_that_is_killed_takes_nothing_with_it(folder: Path, digest: str) -> None:
    out = train(folder, "killed", BOTH, lambda: strike("killed", 1, signal.SIGKILL))
    assert "some of 2 ranks are lost: continuing with 1" in out
    assert out.count("resumed at") == 1
    assert_undisturbed(folder, "killed", digest)


def test_a_rank_that_is_stopped_is_named_and_ended_and_the_others_continue(folder: Path, digest: str) -> None:
    timeout = ["--logging.stall-timeout-s", "10"]
    out = train(folder, "stopped", BOTH, lambda: strike("stopped", 0, signal.SIGSTOP), *timeout)
    named = r"rank 1: no progress for \d\.\d s \(the stalled rank ends at 10 s\): rank 0 of 2 on \S+ has been silent "
    assert re.search(named, out), out
    assert "some of 2 ranks are lost: continuing with 1" in out
    assert "ending:" not in out, "a rank that waits has ended itself"
    assert_undisturbed(folder, "stopped", digest)


def test_a_host_that_is_taken_away_leaves_between_updates(folder: Path, digest: str) -> None:
    out = train(folder, "fewer", BOTH, lambda: offer(folder, FIRST))
    assert "hosts have joined or left (2 ranks until now): continuing with 1" in out
    assert_undisturbed(folder, "fewer", digest)


def test_a_run_that_has_not_begun_is_offered_the_rank_of_its_first_phase(folder: Path, digest: str) -> None:
    out = train(folder, "first", BOTH, lambda: None, follow_plan=True, np=1)
    assert out.count("continuing with") == 1, out  # a rank that has joined does not leave again
    assert "(1 ranks until now): continuing with 2" in out
    assert_undisturbed(folder, "first", digest)


def test_hosts_join_when_the_plan_wants_them(folder: Path, digest: str) -> None:
    out = train(folder, "grown", FIRST, lambda: offer(folder, BOTH), follow_plan=True)
    assert "(1 ranks until now): continuing with 2" in out
    # Phase 2, where there are to be two ranks, begins after 2 epochs of 300 samples.
    resumed = int(out.split("resumed at ")[-1].split(" of")[0].replace(",", ""))
    assert resumed > 600
    assert_undisturbed(folder, "grown", digest)
