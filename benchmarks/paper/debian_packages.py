"""Download Debian packages and unpack them into the user's cache, without installing them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.cache import cache_folder
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.atomic import new_folder
from hvd_batchgrow.storage.file_lock import locked
from hvd_batchgrow.storage.strict_json import dump_json

_VERSIONS = "versions.json"


@dataclass(frozen=True)
class Packages:
    """Unpacked packages: `folder`/NAME has the files of package NAME."""

    folder: Path
    versions: Mapping[str, str]


def unpacked(names: Sequence[str], report: ReportProgress) -> Packages:
    """Return packages from the cache; download and unpack them first if they are missing.

    The cache has one folder for each list of names. apt-get downloads the newest versions that its configured sources
    have; root rights are not needed.

    Args:
        names: names of packages.
        report: called with the progress.

    Raises:
        RunError: apt-get or dpkg is missing or fails, or the cache cannot be written or is damaged.
    """
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    folder = cache_folder() / "debian-packages" / digest[:16]
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not folder.exists():
                with new_folder(folder) as work:
                    _fetch(names, work, report)
        return Packages(folder, _versions(folder))
    except OSError as error:
        raise RunError(
            f"cache {folder}: {error.strerror or error}; for a cache elsewhere, set HVD_BATCHGROW_CACHE"
        ) from None


def _versions(folder: Path) -> Mapping[str, str]:
    try:
        return json.loads((folder / _VERSIONS).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (FileNotFoundError, ValueError):
        raise RunError(f"{folder / _VERSIONS} is missing or damaged: remove {folder}") from None


def _fetch(names: Sequence[str], folder: Path, report: ReportProgress) -> None:
    for program in ("apt-get", "dpkg"):
        if not shutil.which(program):
            raise RunError(f"{program} is not installed: the packages can be downloaded only on Debian or Ubuntu")
    downloads = folder / "downloads"
    downloads.mkdir()
    _download(names, downloads, report)
    versions = {}
    files = sorted(downloads.glob("*.deb"))
    for done, file in enumerate(files, 1):
        name, version = _run("dpkg-deb", "--show", "--showformat=${Package} ${Version}", str(file)).split()
        _run("dpkg", "-x", str(file), str(folder / name))
        versions[name] = version
        report("unpacking packages", done, len(files), "packages")
    if lacking := sorted(set(names) - versions.keys()):
        raise RunError(f"apt-get did not download {', '.join(lacking)}")
    shutil.rmtree(downloads)
    for link in [path for path in folder.rglob("*") if path.is_symlink()]:
        link.unlink()  # many lead to files that only an installed package has
    (folder / _VERSIONS).write_text(dump_json(versions, sort_keys=True), encoding="utf-8")


def _download(names: Sequence[str], folder: Path, report: ReportProgress) -> None:
    log = folder / "log"
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *names]
    english = {**os.environ, "LC_ALL": "C"}  # `fault_of_download` reads the messages
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=english) as download,
    ):
        try:
            while download.poll() is None:
                report("downloading packages", len(list(folder.glob("*.deb"))), len(names), "packages")
                time.sleep(0.1)
        except BaseException:
            download.terminate()
            download.wait()
            raise
    if download.returncode:
        raise RunError(fault_of_download(log.read_text(errors="replace"), download.returncode))


def fault_of_download(log: str, code: int) -> str:
    """Return the message for a failed download.

    Args:
        log: what apt-get printed.
        code: its exit code.
    """
    faults = [line.removeprefix("E: ") for line in log.splitlines() if line.startswith("E: ")]
    shown = "; ".join(faults[:5]) or f"exit code {code}"
    more = f"; and {len(faults) - 5} more errors" if len(faults) > 5 else ""
    hint = ""
    if any("Unable to locate" in fault or "No packages found" in fault for fault in faults):
        hint = ". Run `apt-get update`; if apt-get still does not find a package, remove it from a copy of the list"
    return f"apt-get download failed: {shown}{more}{hint}"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"{' '.join(command[:2])} failed on {command[-1]}: {lines[-1]}")
    return done.stdout
