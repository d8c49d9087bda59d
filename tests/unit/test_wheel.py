"""What an installed wheel can do without the sources beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import hvd_batchgrow
from tests.helpers import job_tree

SOURCES = Path(__file__).parents[2]
BATCH_SCRIPTS = sorted(path.name for path in (SOURCES / "slurm").iterdir())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like the one that pip installs the wheel into, as on a machine without a C compiler."""
    build = "from setuptools import build_meta; build_meta.build_wheel('../wheel')"
    return unpacked(tmp_path_factory.mktemp("plain"), [sys.executable, "-c", build], CC="false")


@pytest.fixture(scope="module")
def compiled_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like the one that pip installs the wheel into; pip builds the wheel, and compiles."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-q"]
    words = [sys.executable, "-m", "pip", "wheel", *options, "-w", "../wheel", "."]
    return unpacked(tmp_path_factory.mktemp("compiled"), words)


def unpacked(folder: Path, build: list[str], **variables: str) -> Path:
    """Build the wheel offline from a copy of the sources, and return the folder with its files."""
    tree, out = folder / "sources", folder / "wheel"
    tree.mkdir()
    out.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(SOURCES / name, tree)
    for name in ("hvd_batchgrow", "slurm"):
        shutil.copytree(SOURCES / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    subprocess.run(build, check=True, cwd=tree, env={**os.environ, **variables}, capture_output=True)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def test_the_wheel_holds_the_batch_scripts(site: Path) -> None:
    folder = site / "hvd_batchgrow" / "slurm" / "templates"
    assert sorted(path.name for path in folder.iterdir()) == BATCH_SCRIPTS
    for name in BATCH_SCRIPTS:
        assert (folder / name).read_bytes() == (SOURCES / "slurm" / name).read_bytes()


def test_the_wheel_holds_the_page_of_reports(site: Path) -> None:
    sources = SOURCES / "hvd_batchgrow" / "reports" / "assets"
    names = sorted(path.name for path in sources.iterdir())
    assert names == ["page.html.j2", "report.css", "report.js"]
    for name in names:
        assert (site / "hvd_batchgrow" / "reports" / "assets" / name).read_bytes() == (sources / name).read_bytes()


def test_the_wheel_holds_the_license_and_says_that_it_is_typed(site: Path) -> None:
    assert (site / "hvd_batchgrow" / "py.typed").exists()
    (metadata,) = site.glob("*.dist-info/METADATA")
    assert "License-Expression: Apache-2.0" in metadata.read_text().splitlines()
    assert (metadata.parent / "licenses" / "LICENSE").read_bytes() == (SOURCES / "LICENSE").read_bytes()


def run(site: Path, folder: Path, command: str, *words: str, **sections: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed package in a folder that holds nothing but the job file."""
    tree = job_tree(**sections)
    if sections:
        tree["data"] = sections["data"]
    (folder / "small.toml").write_text(tomli_w.dumps(tree))
    code = "import sys, hvd_batchgrow.cli as c; print(c.__file__, file=sys.stderr); sys.exit(c.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, command, "small.toml", *words],
        check=False, cwd=folder, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip


def submit(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `submit --dry-run` by the installed package."""
    return run(site, folder, "submit", "--nodes-max", "1", "--dry-run", *words)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_wheel_holds_the_compiled_ghost_norm(compiled_site: Path) -> None:
    assert list((compiled_site / "hvd_batchgrow" / "nn" / "ghost").glob("_ghost_cpu*.so"))


@pytest.mark.slow
def test_plan_and_train_work_from_an_empty_folder(compiled_site: Path, tmp_path: Path) -> None:
    data = {"source": "synthetic_images", "num_samples": 300, "shape": [8, 8, 1], "num_classes": 3}
    sections = {"data": data, "schedule": {"epochs": 0.2, "boundaries_epochs": [0.1]}}
    planned = run(compiled_site, tmp_path, "plan", **sections)
    assert planned.returncode == 0, planned.stderr
    assert "updates" in planned.stdout
    trained = run(compiled_site, tmp_path, "train", **sections)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs" / "small" / "record.json").exists()


@pytest.mark.slow
def test_the_public_names_come_without_torch_until_one_is_used(site: Path) -> None:
    code = (
        "import sys, hvd_batchgrow as h; assert h.__version__; assert 'torch' not in sys.modules;"
        "from hvd_batchgrow import library; assert h.__all__ == library.__all__;"
        "assert all(getattr(h, name) is getattr(library, name) for name in h.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(site)})
    with pytest.raises(AttributeError, match="no attribute 'Wrong'"):
        hvd_batchgrow.Wrong  # noqa: B018


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
