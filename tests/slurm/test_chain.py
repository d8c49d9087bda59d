"""A run as a chain of jobs on a real Slurm: 1, 2 and 4 nodes, and what breaks it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import digest_of, logs, seconds_to_the_end, submit, submitted, write_job
from tests.slurm.hosts import wait_until


def status(cluster: Cluster, run: Path) -> subprocess.CompletedProcess[str]:
    return cluster.run("hvd-batchgrow", "status", str(run))


def test_a_chain_of_1_2_4_nodes_ends_with_the_bits_of_one_allocation(
    cluster: Cluster, work: Path, data: Path, one_allocation: str
) -> None:
    # Names that a shell or sbatch would take for more than names
    cwd = work / 'it\'s a "site" of 100% $(touch stolen) `touch stolen`\n; touch stolen'
    runs = cwd.with_name('runs\' of "50%" $(touch stolen); touch stolen #')
    cwd.mkdir()
    job = write_job(cwd, data)
    comment = 'comment=it\'s "mine" $(touch stolen) # \\ `touch stolen`'
    words = [job.name, "--nodes-max", "4", "--runs-dir", str(runs), "--time", "10", "--sbatch", comment]
    first, second, third = submitted(cluster, cwd, *words)
    waiting = cluster.job(third)
    assert waiting["JobState"] == "PENDING"
    assert waiting["Dependency"] == f"afterok:{second}(unfulfilled)"
    nodes = [int(cluster.wait_for(link)["NumNodes"]) for link in (first, second, third)]
    run = runs / "small"
    report = status(cluster, run)
    assert report.returncode == 0, report.stdout + logs(run)
    assert nodes == [1, 2, 4]
    assert report.stdout.splitlines() == [
        f"chain job 1: phases 1-1 on 1 node, 1 rank, samples 0 … 160: job {first} COMPLETED",
        f"chain job 2: phases 2-2 on 2 nodes, 2 ranks, samples 160 … 304: job {second} COMPLETED",
        f"chain job 3: phases 3-4 on 4 nodes, 4 ranks, samples 304 … 688: job {third} COMPLETED",
        "newest checkpoint: 688 of 688 samples",
    ]
    attempts = json.loads((run / "record.json").read_text())["attempts"]
    assert [attempt["ranks"] for attempt in attempts] == [1, 2, 4]
    assert {attempt["backend"] for attempt in attempts} == {"horovod-mpi"}
    assert cluster.run("hvd-batchgrow", "digest", str(run)).stdout.strip() == one_allocation
    assert not list(work.rglob("stolen"))
    assert comment.removeprefix("comment=") in cluster.run("scontrol", "show", "job", str(first)).stdout
    again = submit(cluster, cwd, *words, "--resume", "auto")
    assert "there is nothing to submit" in again.stdout


def test_a_link_that_fails_cancels_those_after_it_and_status_says_why(
    cluster: Cluster, work: Path, data: Path, one_allocation: str
) -> None:
    write_job(work, data, (1, 2, 1, 1))
    run = work / "runs" / "small"
    first, second, third = submitted(cluster, work, "small.toml", "--nodes-max", "4", FAIL_RANK="1")
    assert cluster.wait_for(first)["JobState"] == "COMPLETED", logs(run)
    wait_until(lambda: "planted" in logs(run) or logs(run).count("ends with code") == 2, "link 2 ends", timeout_s=300)
    assert "planted" in logs(run), logs(run)
    over = cluster.wait_for(second)
    assert over["JobState"] == "FAILED"
    seconds = seconds_to_the_end(over, run, "raised")
    print(f"a rank that raised took its job down in {seconds:.1f} s")
    assert cluster.wait_for(third)["JobState"] == "CANCELLED"
    text = logs(run)
    assert text.count("ZeroDivisionError: planted") == 1
    assert text.count("Traceback (most recent call last)") == 1
    assert "rank 1 of 2 on n2 failed:" in text
    report = status(cluster, run)
    assert report.returncode == 1
    link_2, link_3 = report.stdout.splitlines()[1:3]
    assert link_2.endswith(f"job {second} FAILED, exit code 1")
    assert link_3.endswith(f"job {third} CANCELLED, DependencyNeverSatisfied")
    assert f"small-{second}.out:" in report.stdout
    assert "ends with code 1" in report.stdout
    assert "chain jobs waiting for it were cancelled: 3" in report.stdout
    # After the fix, it resumes where it was.
    assert "holds a run already: add --resume auto" in submit(cluster, work, "small.toml", "--nodes-max", "4").stderr
    second, third = submitted(cluster, work, "small.toml", "--nodes-max", "4", "--resume", "auto")
    refused = submit(cluster, work, "small.toml", "--nodes-max", "4", "--resume", "auto")
    assert f"two chains cannot write it: scancel {second} {third}" in refused.stderr
    assert cluster.wait_for(third)["JobState"] == "COMPLETED", logs(run)
    assert status(cluster, run).stdout.splitlines()[0].endswith("done before")
    assert digest_of(run) == one_allocation


def test_what_slurm_could_never_run_is_reported_before_anything_is_submitted(
    cluster: Cluster, work: Path, data: Path
) -> None:
    write_job(work, data, (1, 2, 6, 6))
    words = ("squeue", "--states=all", "--noheader", "--format=%i")
    before = cluster.run(*words).stdout
    done = submit(cluster, work, "small.toml", "--nodes-max", "8")
    assert done.returncode == 1
    assert "nothing is submitted:\n  chain job 3 (phases 3-4 on 6 nodes, 6 ranks): " in done.stderr
    assert "Node count specification invalid" in done.stderr
    assert cluster.run(*words).stdout == before


def test_tasks_that_srun_does_not_join_are_refused_with_the_remedy(cluster: Cluster, work: Path, data: Path) -> None:
    write_job(work, data)
    words = ["hvd-batchgrow", "train", "small.toml"]
    done = cluster.run("srun", "-N2", "-n2", *words, cwd=work)
    assert done.returncode == 1
    assert done.stderr.count("srun has started 2 tasks without an MPI plugin: each would train the whole job") == 1
    assert "Use srun --mpi=pmix" in done.stderr
    # Open MPI does not support PMI2, and says so itself.
    done = cluster.run("srun", "-N2", "-n2", "--mpi=pmi2", *words, cwd=work)
    assert done.returncode != 0
    assert re.search("SLURM's PMIx support|No PMIx server was reachable", done.stderr)  # Open MPI 4, 5
    assert not (work / "runs").exists()
