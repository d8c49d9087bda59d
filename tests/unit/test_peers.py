"""Packages that only benchmarks use: installed once into the cache, and a reason to skip a row if that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.rows.row import Skip

PACKAGES = ("peer==1.0", "other")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace pip by a function that writes a module and one that cannot be imported; return its commands."""
    calls: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--target") + 1])
        (folder / "peer_of_test_peers.py").write_text("VALUE = 3")
        (folder / "broken_peer_of_test_peers.py").write_text("import no_such_module_of_test_peers")
        is_unknown = "unknown" in command
        return subprocess.CompletedProcess(command, int(is_unknown), "", "first\nERROR: no such package\n")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    return calls


def test_a_list_of_packages_is_installed_once_without_their_requirements(commands: list[list[str]]) -> None:
    folder = peers.installed(PACKAGES)
    assert peers.installed(PACKAGES) == folder
    assert peers.installed(("peer==2.0", "other")) != folder
    assert len(commands) == 2
    assert "--no-deps" in commands[0]
    assert tuple(commands[0][-2:]) == PACKAGES
    (module,) = peers.imported(PACKAGES, "peer_of_test_peers")
    assert (module.VALUE, Path(module.__file__).parent) == (3, folder)


def test_packages_that_cannot_be_used_are_a_reason_to_skip(commands: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(Skip, match="pip cannot install unknown: ERROR: no such package"):
        peers.installed(("unknown",))
    assert [path.suffix for path in (tmp_path / "cache/peers").iterdir()] == [".lock"]
    with pytest.raises(Skip, match=r"peer==1\.0 cannot be imported: No module named 'no_such_module_of_test_peers'"):
        peers.imported(PACKAGES, "broken_peer_of_test_peers")


def test_a_cache_that_cannot_be_written_is_a_reason_to_skip(commands: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(Skip, match=r"peer==1.0 cannot be installed in .*: Not a directory"):
        peers.installed(PACKAGES)
    assert commands == []
