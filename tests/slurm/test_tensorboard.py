"""TensorBoard on a node: reached through the tunnel that its log names, and by nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT
from tests.slurm.hosts import wait_until

_ASK = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).status)"


def test_tensorboard_listens_on_localhost_and_says_how_to_get_there(with_ssh: Cluster, work: Path) -> None:
    cluster, runs = with_ssh, work / "my 'runs'"
    runs.mkdir()
    script = str(ROOT / "slurm" / "tensorboard.sbatch")
    words = ["sbatch", "--parsable", "--nodelist=n2", f"--output={work}/log", script, str(runs)]
    job = int(cluster.run(*words, cwd=work, USER="me", LOGIN_HOST="login.example.org").stdout)
    log = work / "log"
    wait_until(lambda: log.exists() and "localhost:6006" in log.read_text(), "the line is there", timeout_s=300)
    line = re.search(r"ssh -N -L 6006:localhost:(\d+) -J (\S+) (\S+)", log.read_text())
    assert line is not None
    assert (line[2], line[3]) == ("me@login.example.org", "me@n2")
    try:

        def ask(host: str, address: str) -> str:
            return cluster.hosts.run(host, "python3", "-c", _ASK, f"http://{address}/").stdout.strip()

        wait_until(lambda: ask("n2", f"localhost:{line[1]}") == "200", log.read_text(), timeout_s=300, every_s=0.5)
        assert ask("head", f"n2:{line[1]}") == ""
        tunnel = ["ssh", "-f", "-N", "-L", f"6006:localhost:{line[1]}", "n2"]
        cluster.hosts.run("head", *tunnel, quiet=True).check_returncode()
        wait_until(lambda: ask("head", "localhost:6006") == "200", "the tunnel leads there", every_s=0.5)
    finally:
        cluster.run("scancel", str(job))
