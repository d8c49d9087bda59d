"""The commands of docs/guide.md that need a cluster, on a real Slurm."""

from __future__ import annotations

import re
from pathlib import Path

from tests.guide import blocks, write_files
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import logs


def test_the_chain_of_the_guide_is_submitted_and_trained(cluster: Cluster, work: Path) -> None:
    write_files(work)
    on_slurm = [block for block in blocks() if block.needs_slurm]
    assert on_slurm
    for block in on_slurm:
        done = cluster.run("bash", "-euo", "pipefail", "-c", f"{{\n{block.script}}} 2>&1", cwd=work)
        assert done.returncode == 0, done.stdout
        print(done.stdout)
        assert block.first_missing(done.stdout) is None, done.stdout
        for job in re.findall(r": job (\d+)", done.stdout):
            assert cluster.wait_for(int(job))["JobState"] == "COMPLETED", logs(work / "runs" / "stripes")
