"""What tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from hvd_batchgrow.comm.ranks import SingleRank
from tests.helpers import job_tree, small_source, write_idx_folder
from tests.trained_runs import photos, rows  # noqa: F401  # fixtures


class NoSwitch:
    """Stands in for the kernel's timer."""

    def set(self, after_s: float) -> None:
        """Arm nothing."""

    def close(self) -> None:
        """Nothing is armed."""


@pytest.fixture(autouse=True)
def _survive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a fault in a command fail its test: a rank, or its timer, would end this process with all other tests."""
    monkeypatch.setattr(SingleRank, "abort", lambda self, code: None)
    monkeypatch.setattr("hvd_batchgrow.train.liveness.watchdog.SelfKillTimer", NoSwitch)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a job file with its data, in a separate folder with a separate cache."""
    root = write_idx_folder(tmp_path / "data", small_source())
    (tmp_path / "small.toml").write_text(tomli_w.dumps(job_tree(root)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    return "small.toml"


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test alone, in no folder of its data."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(folder))
    return folder
