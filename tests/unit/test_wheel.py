"""What an installed wheel can do without the sources beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomli_w

from tests.helpers import job_tree

SOURCES = Path(__file__).parents[2]
BATCH_SCRIPTS = sorted(path.name for path in (SOURCES / "slurm").iterdir())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip would install the wheel into, which is built from a copy of the sources, offline."""
    tree, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md"):
        shutil.copy(SOURCES / name, tree)
    for name in ("hvd_batchgrow", "slurm"):
        shutil.copytree(SOURCES / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-q"]
    # No compiler: the extension is optional, and of no interest here.
    environment = {**os.environ, "CC": "/bin/false"}
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(out), str(tree)],
        check=True, env=environment, capture_output=True,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def test_the_wheel_holds_the_batch_scripts(site: Path) -> None:
    folder = site / "hvd_batchgrow" / "slurm" / "templates"
    assert sorted(path.name for path in folder.iterdir()) == BATCH_SCRIPTS
    for name in BATCH_SCRIPTS:
        assert (folder / name).read_bytes() == (SOURCES / "slurm" / name).read_bytes()


def submit(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `submit --dry-run` by the installed package, in a folder that has nothing but the job file."""
    (folder / "small.toml").write_text(tomli_w.dumps(job_tree()))
    code = "import sys, hvd_batchgrow.cli as c; print(c.__file__, file=sys.stderr); sys.exit(c.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "submit", "small.toml", "--nodes-max", "1", "--dry-run", *words],
        check=False, cwd=folder, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip


def test_submit_finds_its_template_in_the_wheel(site: Path, tmp_path: Path) -> None:
    done = submit(site, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == f"{site}/hvd_batchgrow/cli/__init__.py"
    # The first comment after the options of the shipped script, and what is filled in.
    assert "#SBATCH --job-name=small" in done.stdout
    body = (SOURCES / "slurm" / "train.sbatch").read_text().partition("\nset -euo")[2].splitlines()
    assert body[-1] in done.stdout.splitlines()


def test_a_missing_template_names_those_of_the_wheel(site: Path, tmp_path: Path) -> None:
    done = submit(site, tmp_path, "--template", "mine.sbatch")
    assert done.returncode == 2
    shipped = site / "hvd_batchgrow" / "slurm" / "templates"
    assert f"mine.sbatch does not exist; copy {shipped}/train-mpirun.sbatch or {shipped}/train.sbatch" in done.stderr
