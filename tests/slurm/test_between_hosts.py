"""mpirun and horovodrun between hosts by ssh, and a cable that is pulled."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import TEMPLATES, digest_of, logs, num_records, submitted, write_job
from tests.slurm.hosts import wait_until

KEEPALIVE = ("time 5", "intvl 2", "probes 3")
"""What docs/launching.md says to give mpirun."""

SLOW_S = "3"
"""A pass: whichever run begins first is not done before the other trains."""

FORMS = {
    "mpirun": [
        "mpirun", "-np", "2", "-H", "n1:1,n2:1", "--bind-to", "none", "-x", "PATH", "-x", "PYTHONPATH",
        *(word for pair in KEEPALIVE for word in ["--mca", *f"oob_tcp_keepalive_{pair}".split()]),
    ],
    "horovodrun": ["horovodrun", "-np", "2", "-H", "n1:1,n2:1", "--gloo", "--start-timeout", "300"],
}  # fmt: skip


@pytest.mark.parametrize("form", list(FORMS))
def test_ranks_on_two_hosts_are_bit_identical_to_one_host(
    with_ssh: Cluster, work: Path, data: Path, one_allocation: str, form: str
) -> None:
    write_job(work, data, (2, 2, 2, 2))
    done = with_ssh.hosts.run("n1", *FORMS[form], "hvd-batchgrow", "train", "small.toml", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert digest_of(work / "runs" / "small") == one_allocation


def test_a_pulled_cable_ends_what_mpirun_runs_by_ssh_and_inside_slurm(
    with_ssh: Cluster, work: Path, data: Path
) -> None:
    cluster, by_ssh, inside = with_ssh, work / "ssh", work / "slurm"
    version = cluster.run("mpirun", "--version").stdout
    open_mpi = int(version.partition("(Open MPI) ")[2].partition(".")[0])
    for folder in (by_ssh, inside):
        folder.mkdir()
        write_job(folder, data, (2, 2, 2, 2))
    words = ["small.toml", "--nodes-max", "2", "--template", str(TEMPLATES["train-mpirun"])]
    (job,) = submitted(cluster, inside, *words, SLOW_S=SLOW_S)
    process = subprocess.Popen(
        cluster.hosts.on("n1", *FORMS["mpirun"], "-x", "SLOW_S", "hvd-batchgrow", "train", "small.toml", cwd=by_ssh),
        env={**cluster.hosts.environment, "SLOW_S": SLOW_S},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for folder in (by_ssh, inside):
            wait_until(partial(num_records, folder / "runs" / "small"), "the run trains", timeout_s=300)
        assert cluster.job(job)["NodeList"] == "n[1-2]"
        cluster.hosts.cable("n2", plugged=False)
        pulled = time.monotonic()
        ends: dict[str, Callable[[], bool]] = {
            "by ssh": lambda: process.poll() is not None,
            "inside Slurm": lambda: "ends with code" in logs(inside / "runs" / "small"),
        }
        while ends and time.monotonic() - pulled < 30:
            for form in [form for form, is_over in ends.items() if is_over()]:
                print(f"mpirun {form} ended {time.monotonic() - pulled:.1f} s after the cable was pulled")
                del ends[form]
            time.sleep(0.1)
        assert not ends, "still there after 30 s"
        assert process.returncode != 0 or open_mpi >= 5  # its mpirun ends with 0 here; the batch script does not
    finally:
        process.kill()
        process.wait(timeout=20)
        cluster.hosts.cable("n2", plugged=True)
    assert cluster.wait_for(job)["JobState"] == "FAILED"
    cluster.wait_until_idle()
