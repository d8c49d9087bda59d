"""Branches of a run as an array of jobs on a real Slurm: failures, stops, and the table of the sequential command."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import num_records, submit, write_job
from tests.slurm.hosts import wait_until

OPTIONS = ["--at", "160", "--factors", "1,2", "--samples", "1536"]
BRANCHES = Path("runs/small/branches/at-160-for-1536-linear")


def table(text: str) -> dict[str, Any]:
    """Return the JSON of a table without what differs between places, times and layouts."""
    tree: dict[str, Any] = json.loads(text)
    del tree["run"]
    for row in tree["branches"]:
        del row["seconds"], row["ranks"], row["folder"]
    return tree


def submitted(cluster: Cluster, work: Path, **variables: str) -> tuple[int, int]:
    """Submit the branches on 2 nodes each; return the ids of the array and of the table's job."""
    done = submit(cluster, work, "runs/small", "--branch", *OPTIONS, "--nodes-max", "2", **variables)
    assert done.returncode == 0, done.stderr
    one, two, last = done.stdout.splitlines()[:3]
    array = int(one.removeprefix("k = 1: job ").removesuffix("_1"))
    assert two == f"k = 2: job {array}_2"
    return array, int(last.removeprefix("table: job ").partition(",")[0])


def _has_more_records(run: Path, before: int) -> bool:
    return num_records(run) > before


def test_branches_that_fail_and_are_stopped_end_with_the_table_of_the_sequential_command(
    cluster: Cluster, work: Path, data: Path
) -> None:
    write_job(work, data, (1, 1, 1, 1))
    trained = cluster.run("hvd-batchgrow", "train", "small.toml", cwd=work)
    assert trained.returncode == 0, trained.stderr
    other, folder = work / "other", work / BRANCHES
    shutil.copytree(work / "runs", other / "runs")

    # All tasks fail: the table's job names the branches.
    array, last = submitted(cluster, work, FAIL_RANK="1")
    assert cluster.wait_for(last)["JobState"] == "FAILED"
    log = (folder / f"slurm/small-table-{last}.out").read_text()
    assert "2 of 2 branches in " in log
    assert "  k = 2 has a checkpoint at sample 160 of 1,696" in log
    assert "repeat the submit command, which submits only these" in log
    status = cluster.run("hvd-batchgrow", "status", "runs/small", cwd=work)
    assert status.returncode == 1
    assert f"  k = 1: job {array}_1 FAILED\n" in status.stdout

    # Each task that has a stop request is requeued alone, and resumes.
    array, last = submitted(cluster, work, SLOW_S="3")
    again = submit(cluster, work, "runs/small", "--branch", *OPTIONS, "--nodes-max", "2")
    assert f"nothing to submit: jobs {array}_1, {array}_2 are waiting or running already" in again.stdout
    for factor in (1, 2):
        branch = folder / f"k{factor}"
        trains = partial(_has_more_records, branch, num_records(branch))
        wait_until(trains, "the branch trains", timeout_s=600)
        cluster.run("scancel", "-b", "-s", "USR2", f"{array}_{factor}")
    logs = [folder / f"slurm/small-branches-{array}_{factor}.out" for factor in (1, 2)]
    assert cluster.wait_for(last)["JobState"] == "COMPLETED", "".join(path.read_text() for path in logs)
    for path in logs:
        assert path.read_text().count("stopped, and is requeued to resume") == 1
        assert "start 2: ends with code 0" in path.read_text()
    assert "k = 2: trained" in cluster.run("hvd-batchgrow", "status", "runs/small", cwd=work).stdout

    sequential = cluster.run("hvd-batchgrow", "branch", "runs/small", *OPTIONS, "--json", cwd=other)
    assert sequential.returncode == 0, sequential.stderr
    assert table((folder / "table.json").read_text()) == table(sequential.stdout)
    assert (folder / "table.txt").read_text() in (folder / f"slurm/small-table-{last}.out").read_text()
    again = submit(cluster, work, "runs/small", "--branch", *OPTIONS, "--nodes-max", "2")
    assert "nothing to submit: all branches are trained" in again.stdout
