"""One cluster of four nodes for all tests of this folder, and a small job to train on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.verification.digest import final_weights
from tests.helpers import job_tree, small_source, write_idx_folder
from tests.slurm.cluster import Cluster, why_no_cluster
from tests.slurm.hosts import why_no_hosts

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TEMPLATES = {name: ROOT / "slurm" / f"{name}.sbatch" for name in ("train", "train-mpirun")}

RANKS_PER_PHASE = (1, 2, 4, 4)
"""Of the job's four phases: as a chain it takes 1, 2 and 4 nodes."""


SHARED = (ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve())
"""The checkout, the virtual environment and the Python it was made from: every host sees them, also below /tmp."""


def why_not_here() -> str | None:
    """Say what in this virtual environment does not fit the tests; None: nothing."""
    if (BIN / "mpirun").exists():
        return "Slurm's PMIx and the launch files are tested with the system's Open MPI, and .venv has its own"
    return None


@pytest.fixture(scope="session")
def shared() -> Iterator[Path]:
    """A folder that all hosts see."""
    if reason := why_not_here() or why_no_cluster() or why_no_hosts():
        pytest.skip(reason)
    base = ROOT / "build" / "slurm-tests"
    base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=base))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(shared: Path) -> Iterator[Cluster]:
    environment = {
        **{
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "OMPI_", "PMI"))
        },
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HVD_BATCHGROW_CACHE": str(shared / "cache"),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    with Cluster(4, shared / "slurm cluster", environment, shared=SHARED) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def with_ssh(cluster: Cluster) -> Cluster:
    if not Path("/usr/sbin/sshd").exists():
        pytest.skip("openssh-server is not installed")
    cluster.start_ssh()
    return cluster


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    return write_idx_folder(shared / "data", small_source())


@pytest.fixture
def work(shared: Path, request: pytest.FixtureRequest) -> Path:
    """An empty folder for one test."""
    # horovodrun --gloo goes to its working directory without quoting it: no spaces.
    folder: Path = shared / request.node.name.replace("[", "-").replace("]", "")
    folder.mkdir()
    return folder


def write_job(folder: Path, data: Path, ranks_per_phase: tuple[int, ...] = RANKS_PER_PHASE) -> Path:
    """The small job, exact: of all its layouts the weights are bit-identical."""
    layout: dict[str, Any] = {"grow_by": "ranks", "ranks_per_phase": list(ranks_per_phase), "exact": True}
    tree = job_tree(data, layout=layout, model={"name": "tests.slurm.slow:Slow"})
    del tree["model"]["channels"]
    path = folder / "small.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


@pytest.fixture(scope="session")
def one_allocation(cluster: Cluster, shared: Path, data: Path) -> str:
    """Digest of the job in one allocation of two nodes, never stopped; its batch script is submitted by hand."""
    folder = shared / "one allocation"
    folder.mkdir()
    words = [str(TEMPLATES["train"]), str(write_job(folder, data)), "--layout.grow_by", "accumulation"]
    done = cluster.run("sbatch", "--parsable", "--nodes=2", *words, cwd=folder)
    assert cluster.wait_for(int(done.stdout))["JobState"] == "COMPLETED"
    return digest_of(folder / "runs" / "small")


def digest_of(run: Path) -> str:
    """What `hvd-batchgrow digest` prints of a run that is done; in this process, which has torch already."""
    weights = final_weights(run)
    assert weights.is_final
    return weights.digest


def submit(cluster: Cluster, cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`hvd-batchgrow submit` on the head."""
    return cluster.run("hvd-batchgrow", "submit", *words, cwd=cwd, **variables)


def submitted(cluster: Cluster, cwd: Path, *words: str, **variables: str) -> list[int]:
    """The jobs of the links that `submit` submits."""
    done = submit(cluster, cwd, *words, **variables)
    assert done.returncode == 0, done.stderr
    return [int(line.partition(": job ")[2].split()[0]) for line in done.stdout.splitlines() if ": job " in line]


def logs(run: Path) -> str:
    """Return the output of all jobs of a chain."""
    return "".join(path.read_text() for path in sorted((run / "slurm").glob("*.out")))


def seconds_to_the_end(job: dict[str, str], run: Path, fate: str) -> float:
    """From when a rank was "killed" or "raised", by the log of its job, to the end of that job, by Slurm."""
    report = re.search(rf"{fate} at (\d+\.\d)", logs(run))
    assert report is not None, logs(run)
    return datetime.fromisoformat(job["EndTime"]).timestamp() - float(report[1])


def num_records(run: Path) -> int:
    """Return the number of training records of a run."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
