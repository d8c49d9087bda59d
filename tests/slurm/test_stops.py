"""Jobs of a chain that are stopped, or lose a node, resume by themselves and end with the same weights.

All of them run side by side: most of their time is spent waiting.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import TEMPLATES, digest_of, logs, num_records, seconds_to_the_end, submitted, write_job
from tests.slurm.hosts import wait_until


@dataclass(frozen=True)
class Stopped:
    """A chain of one link."""

    job_id: int
    run: Path
    power_off_at: float = 0.0

    def attempts(self) -> list[int]:
        """Return the number of ranks of each attempt."""
        return [attempt["ranks"] for attempt in json.loads((self.run / "record.json").read_text())["attempts"]]


@pytest.fixture(scope="module")
def stopped(cluster: Cluster, shared: Path, data: Path, one_allocation: str) -> dict[str, Stopped]:
    """Start runs that train slowly in their first attempt, and stop or damage each one."""
    del one_allocation  # first, while all nodes are there

    def start(name: str, num_nodes: int, *words: str, **variables: str) -> Stopped:
        folder = shared / name
        folder.mkdir()
        write_job(folder, data, (num_nodes,) * 4)
        chain = ["small.toml", "--nodes-max", str(num_nodes), *words]
        (job,) = submitted(cluster, folder, *chain, **{"SLOW_S": "1", **variables})
        return Stopped(job, folder / "runs" / "small")

    # Slurm looks at time limits every half minute: the signal comes after 30 to 60 s, and leaves two minutes to save.
    runs = {"limit": start("limit", 1, "--time", "00:03:00", "--signal-delay-s", "150", SLOW_S="3")}
    # Rank 1 sleeps, and rank 0 waits for it in an all-reduce. Without n1, so that other tests need not its last node.
    runs["power"] = start("power", 2, "--sbatch", "exclude=n1", SLOW_RANK="1", SLOW_S="3")
    for template, path in TEMPLATES.items():
        words = ("--template", str(path), "--sbatch", "nodelist=n[1-2]")
        runs[template] = start(template, 2, *words, SLOW_S="3")  # time for the request, also on a busy machine
    runs["killed"] = start("killed", 2, "--sbatch", "nodelist=n[1-2]", SLOW_S="0", KILL_RANK="1")
    runs["often"] = start("often", 1, "--sbatch", "nodelist=n1", MAX_RESTARTS="0")
    # Asked at once, while its rank imports torch.
    wait_until(lambda: "begins on" in logs(runs["often"].run), "the script begins", timeout_s=600)
    cluster.run("scancel", "-b", "-s", "USR2", str(runs["often"].job_id))
    left = {"power", *TEMPLATES}

    def training() -> set[str]:
        return {name for name in left if num_records(runs[name].run)}

    while left:  # each as soon as it trains, before it is done
        wait_until(training, f"one of {left} trains", timeout_s=600)
        for name in training():
            left.remove(name)
            if name == "power":
                assert cluster.job(runs[name].job_id)["NodeList"] == "n[2-3]"
                cluster.hosts.power_off("n3")
                runs[name] = replace(runs[name], power_off_at=time.time())
            else:
                cluster.run("scancel", "-b", "-s", "USR2", str(runs[name].job_id))
    return runs


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_job_with_a_stop_request_saves_and_is_requeued(
    cluster: Cluster, stopped: dict[str, Stopped], one_allocation: str, template: str
) -> None:
    chain = stopped[template]
    assert cluster.wait_for(chain.job_id)["JobState"] == "COMPLETED", logs(chain.run)
    text = logs(chain.run)
    assert "the same command with --name" in text
    assert "start 1: stopped, and is requeued to resume" in text
    assert text.count("resumed at ") == 1
    assert "start 2: ends with code 0" in text  # appended: one log has both
    assert chain.attempts() == [2, 2]
    assert digest_of(chain.run) == one_allocation
    assert "COMPLETED, requeued 1 ×" in cluster.run("hvd-batchgrow", "status", str(chain.run)).stdout


def test_a_link_that_is_stopped_too_often_is_left_alone(cluster: Cluster, stopped: dict[str, Stopped]) -> None:
    chain = stopped["often"]
    assert cluster.wait_for(chain.job_id)["JobState"] == "FAILED"
    report = cluster.run("hvd-batchgrow", "status", str(chain.run))
    assert report.returncode == 1
    assert f"job {chain.job_id} FAILED, exit code 75" in report.stdout
    assert "stopped, and not requeued: max_restarts=0 is reached" in report.stdout
    saved = re.search(r"newest checkpoint: (\d+) of 688 samples", report.stdout)
    assert saved, report.stdout
    assert int(saved[1]) <= 5 * 16  # in its first updates, of 16 samples and a second each


def test_a_rank_that_is_killed_takes_its_link_down(cluster: Cluster, stopped: dict[str, Stopped]) -> None:
    chain = stopped["killed"]
    job = cluster.wait_for(chain.job_id)
    assert job["JobState"] == "FAILED"
    seconds = seconds_to_the_end(job, chain.run, "killed")
    print(f"a rank that was killed took its job down in {seconds:.1f} s")


def test_a_job_that_reaches_its_time_limit_resumes_to_the_end(
    cluster: Cluster, stopped: dict[str, Stopped], one_allocation: str
) -> None:
    chain = stopped["limit"]
    assert cluster.wait_for(chain.job_id)["JobState"] == "COMPLETED", logs(chain.run)
    assert "start 1: stopped, and is requeued to resume" in logs(chain.run)
    assert len(chain.attempts()) >= 2  # on a busy machine it may be stopped again
    assert digest_of(chain.run) == one_allocation


def test_a_node_that_loses_power_in_an_all_reduce_is_replaced(
    cluster: Cluster, stopped: dict[str, Stopped], one_allocation: str
) -> None:
    chain = stopped["power"]
    job = cluster.wait_for(chain.job_id)
    assert job["JobState"] == "COMPLETED", logs(chain.run)
    assert job["NodeList"] == "n[2,4]"
    noticed = re.search(r"CANCELLED AT (\S+)", logs(chain.run))
    assert noticed is not None
    seconds = datetime.fromisoformat(noticed[1]).timestamp() - chain.power_off_at
    print(f"a node without power was noticed in {seconds:.0f} s (SlurmdTimeout {cluster.silent_s})")
    assert chain.attempts() == [2, 2]
    assert digest_of(chain.run) == one_allocation
    cluster.revive("n3")
