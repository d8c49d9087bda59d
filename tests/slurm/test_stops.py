"""Links that are stopped, or lose a node, and go on by themselves to the same weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import TEMPLATES, digest_of, logs, num_records, submitted, write_job
from tests.slurm.hosts import wait_until


@pytest.fixture(scope="module")
def timing_out(cluster: Cluster, shared: Path, data: Path) -> tuple[int, Path]:
    """A job whose time limit is near: Slurm looks every half minute, and other tests may run meanwhile."""
    work = shared / "timing out"
    work.mkdir()
    write_job(work, data, (1, 1, 1, 1))
    limit = ["--time", "00:01:00", "--signal-delay-s", "45"]
    # 86 passes: over in 60 s, were there no limit
    (job,) = submitted(cluster, work, "small.toml", "--nodes-max", "1", *limit, SLOW_S="0.7")
    return job, work / "runs" / "small"


def lives_of(run: Path) -> list[int]:
    return [life["ranks"] for life in json.loads((run / "record.json").read_text())["lives"]]


@pytest.mark.usefixtures("timing_out")
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_link_that_is_asked_to_stop_saves_and_is_queued_again(
    cluster: Cluster, work: Path, data: Path, one_allocation: str, template: str
) -> None:
    write_job(work, data, (2, 2, 2, 2))
    run = work / "runs" / "small"
    words = ["small.toml", "--nodes-max", "2", "--template", str(TEMPLATES[template])]
    (job,) = submitted(cluster, work, *words, SLOW_S="0.5")
    wait_until(lambda: num_records(run), "the run trains", timeout_s=60)
    asked = time.monotonic()
    cluster.run("scancel", "-b", "-s", "USR2", str(job))
    cluster.wait_for(job, "PENDING")
    print(f"{template}: saved and queued again in {time.monotonic() - asked:.1f} s")
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", logs(run)
    text = logs(run)
    assert "small: stopped, go on with --resume auto" in text
    assert "start 1: stopped with code 75, and is queued again to go on" in text
    assert text.count("resumed at ") == 1
    assert "start 2: ends with code 0" in text  # appended: one log has both
    assert lives_of(run) == [2, 2]
    assert digest_of(run) == one_allocation
    assert "COMPLETED, queued again 1 ×" in cluster.run("hvd-batchgrow", "status", str(run)).stdout


def test_a_link_that_is_stopped_too_often_is_left_alone(cluster: Cluster, work: Path, data: Path) -> None:
    write_job(work, data, (1, 1, 1, 1))
    run = work / "runs" / "small"
    (job,) = submitted(cluster, work, "small.toml", "--nodes-max", "1", SLOW_S="0.5", MAX_RESTARTS="0")
    wait_until(lambda: num_records(run), "the run trains", timeout_s=60)
    cluster.run("scancel", "-b", "-s", "USR2", str(job))
    assert cluster.wait_for(job)["JobState"] == "FAILED"
    told = cluster.run("hvd-batchgrow", "status", str(run))
    assert told.returncode == 1
    assert f"job {job} FAILED, exit code 75" in told.stdout
    assert "stopped with code 75, and not queued again: max_restarts=0 is reached" in told.stdout


@pytest.mark.usefixtures("timing_out")
def test_a_node_that_loses_power_in_an_all_reduce_is_replaced(
    cluster: Cluster, work: Path, data: Path, one_allocation: str
) -> None:
    write_job(work, data, (2, 2, 2, 2))
    run = work / "runs" / "small"
    (job,) = submitted(cluster, work, "small.toml", "--nodes-max", "2", SLOW_S="0.5", SLOW_RANK="1")
    wait_until(lambda: num_records(run), "the run trains", timeout_s=60)
    lost = _last_node(cluster.job(job)["NodeList"])
    # Rank 1 sleeps, and rank 0 waits for it in an all-reduce.
    cluster.hosts.power_off(lost)
    off = time.monotonic()
    cluster.wait_for(job, "PENDING")
    print(f"a node without power was noticed in {time.monotonic() - off:.1f} s (SlurmdTimeout {cluster.silent_s})")
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", logs(run)
    assert lost != _last_node(cluster.job(job)["NodeList"])
    assert lives_of(run) == [2, 2]
    assert digest_of(run) == one_allocation
    cluster.revive(lost)


def _last_node(names: str) -> str:
    """Of `n[1-2]` or `n1`: the last."""
    return "n" + names.rstrip("]")[-1]


def test_a_link_that_reaches_its_time_limit_goes_on_to_the_end(
    cluster: Cluster, timing_out: tuple[int, Path], one_allocation: str
) -> None:
    job, run = timing_out
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", logs(run)
    assert "start 1: stopped with code 75, and is queued again to go on" in logs(run)
    assert len(lives_of(run)) >= 2
    assert digest_of(run) == one_allocation
