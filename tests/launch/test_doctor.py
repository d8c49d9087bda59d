"""`mpirun -np 2 hvd-batchgrow doctor`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launch.test_forms import run


def test_rank_0_reports_once_for_all_ranks(tmp_path: Path) -> None:
    done = run(tmp_path, "mpirun", "doctor", "--json")
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert done.returncode == (0 if report["passed"] else 1), done.stdout
    assert checks["versions"]["status"] == "ok"
    assert checks["versions"]["found"].startswith("2 ranks on 1 host have the same versions")
    assert checks["all-reduce"]["status"] == "ok"
    assert "2 ranks over MPI (horovod-mpi) on the CPU" in checks["all-reduce"]["found"]
