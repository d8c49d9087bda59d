"""mpirun and horovodrun between hosts by ssh, and a cable that is pulled."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import TEMPLATES, digest_of, logs, num_records, submitted, write_job
from tests.slurm.hosts import wait_until

KEEPALIVE = ("time 5", "intvl 2", "probes 3")
"""What docs/launching.md says to give mpirun."""

FORMS = {
    "mpirun": [
        "mpirun", "-np", "2", "-H", "n1:1,n2:1", "--bind-to", "none", "-x", "PATH", "-x", "PYTHONPATH",
        *(word for pair in KEEPALIVE for word in ["--mca", *f"oob_tcp_keepalive_{pair}".split()]),
    ],
    "horovodrun": ["horovodrun", "-np", "2", "-H", "n1:1,n2:1", "--gloo"],
}  # fmt: skip


@pytest.mark.parametrize("form", list(FORMS))
def test_ranks_on_two_hosts_train_to_the_same_bits(
    with_ssh: Cluster, work: Path, data: Path, one_allocation: str, form: str
) -> None:
    write_job(work, data, (2, 2, 2, 2))
    done = with_ssh.hosts.run("n1", *FORMS[form], "hvd-batchgrow", "train", "small.toml", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert digest_of(work / "runs" / "small") == one_allocation


def test_a_pulled_cable_ends_a_run_by_ssh(with_ssh: Cluster, work: Path, data: Path) -> None:
    write_job(work, data, (2, 2, 2, 2))
    words = [*FORMS["mpirun"], "-x", "SLOW_S", "hvd-batchgrow", "train", "small.toml"]
    environment = {**with_ssh.hosts.environment, "SLOW_S": "1"}
    process = subprocess.Popen(
        with_ssh.hosts.on("n1", *words, cwd=work),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: num_records(work / "runs" / "small"), "the run trains", timeout_s=60)
        with_ssh.hosts.cable("n2", plugged=False)
        pulled = time.monotonic()
        assert process.wait(timeout=60) != 0
        assert time.monotonic() - pulled < 30
        print(f"mpirun by ssh ended {time.monotonic() - pulled:.1f} s after the cable was pulled")
    finally:
        process.kill()
        with_ssh.hosts.cable("n2", plugged=True)


def test_a_pulled_cable_ends_a_link_under_mpirun(cluster: Cluster, work: Path, data: Path) -> None:
    write_job(work, data, (2, 2, 2, 2))
    run = work / "runs" / "small"
    words = ["small.toml", "--nodes-max", "2", "--template", str(TEMPLATES["train-mpirun"])]
    (job,) = submitted(cluster, work, *words, SLOW_S="1")
    wait_until(lambda: num_records(run), "the run trains", timeout_s=60)
    try:
        assert cluster.job(job)["NodeList"] == "n[1-2]"
        cluster.hosts.cable("n2", plugged=False)
        pulled = time.monotonic()
        wait_until(lambda: "ends with code" in logs(run), "the link ends", timeout_s=30)
        print(f"a link under mpirun ended {time.monotonic() - pulled:.1f} s after the cable was pulled")
    finally:
        cluster.hosts.cable("n2", plugged=True)
    assert cluster.wait_for(job)["JobState"] == "FAILED"
    cluster.wait_until_idle()
