"""Packages that are downloaded by apt-get and unpacked into the cache, with a stand-in for apt-get."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.paper.debian_packages import fault_of_download, unpacked
from hvd_batchgrow.messages.errors import RunError

APT_GET = """#!/bin/sh
echo "$@" >> {log}
for name; do if test -e {folder}/$name.deb; then cp {folder}/$name.deb . ; fi; done
{end}
"""


def quiet(what: str, done: int, total: int, unit: str = "bytes", /) -> None:
    assert unit == "packages"


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a folder first on PATH whose apt-get copies packages; return the folder with the packages `one` and `two`."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb")
    for name in ("one", "two"):
        tree = tmp_path / f"tree-{name}"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 2:1.5-1\nArchitecture: all\nMaintainer: m <m@example.org>\nDescription: d\n"
        )
        (tree / "file").write_text(name)
        (tree / "link").symlink_to("/nowhere")
        command = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(tmp_path / f"{name}.deb")]
        subprocess.run(command, check=True, capture_output=True)
    write_apt(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write_apt(folder: Path, end: str = "") -> None:
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin/apt-get"
    program.write_text(APT_GET.format(log=folder / "log", folder=folder, end=end))
    program.chmod(0o755)


def test_packages_are_unpacked_once_for_each_list_of_names(fake_apt: Path) -> None:
    found = unpacked(["one", "two"], quiet)
    assert found.versions == {"one": "2:1.5-1", "two": "2:1.5-1"}
    assert (found.folder / "two/file").read_text() == "two"
    assert not (found.folder / "two/link").is_symlink()
    assert list(found.folder.rglob("*.deb")) == []
    assert unpacked(["two", "one"], quiet) == found
    assert len((fake_apt / "log").read_text().splitlines()) == 1
    assert unpacked(["one"], quiet).folder != found.folder


def test_a_failed_download_leaves_nothing_and_can_be_repeated(fake_apt: Path) -> None:
    write_apt(fake_apt, 'echo "E: Unable to locate package three" >&2; exit 100')
    with pytest.raises(RunError, match=r"Unable to locate package three\. Run `apt-get update`"):
        unpacked(["one", "three"], quiet)
    write_apt(fake_apt)
    with pytest.raises(RunError, match="apt-get did not download three"):
        unpacked(["one", "three"], quiet)
    assert [path.suffix for path in (fake_apt / "cache/debian-packages").iterdir()] == [".lock"]


def test_messages_of_apt_get_are_english_and_a_damaged_cache_is_named(
    fake_apt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    write_apt(fake_apt, 'if test "$LC_ALL" != C; then echo "E: Paket fehlt" >&2; exit 100; fi')
    found = unpacked(["one"], quiet)
    (found.folder / "versions.json").write_text("{")
    with pytest.raises(RunError, match=rf"versions\.json is missing or damaged: remove {found.folder}"):
        unpacked(["one"], quiet)


def test_a_download_that_is_interrupted_ends(fake_apt: Path) -> None:
    begun = fake_apt / "pid"
    write_apt(fake_apt, f"echo $$ > {begun}.part; mv {begun}.part {begun}; exec sleep 1000")

    def interrupt(what: str, done: int, total: int, unit: str = "bytes", /) -> None:
        if begun.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpacked(["one"], interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)
    assert [path.suffix for path in (fake_apt / "cache/debian-packages").iterdir()] == [".lock"]


def test_a_damaged_package_is_named(fake_apt: Path) -> None:
    (fake_apt / "one.deb").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"dpkg-deb --show failed on .*one\.deb: "):
        unpacked(["one"], quiet)


def test_a_system_without_apt_get_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RunError, match="apt-get is not installed"):
        unpacked(["one"], quiet)


def test_an_unwritable_cache_is_named(fake_apt: Path) -> None:
    (fake_apt / "cache").write_text("a file")
    with pytest.raises(RunError, match=r"cache .*: (Not a directory|File exists); for a cache elsewhere, set HVD_"):
        unpacked(["one"], quiet)


def test_the_message_of_a_failed_download_is_that_of_apt_get() -> None:
    log = "Get:1\nE: Failed to fetch x  Temporary failure\nE: Some files failed\n"
    assert fault_of_download(log, 100) == (
        "apt-get download failed: Failed to fetch x  Temporary failure; Some files failed"
    )
    assert fault_of_download("", 1) == "apt-get download failed: exit code 1"
    assert "; and 2 more errors" in fault_of_download("E: no\n" * 7, 1)
