"""Packages that only benchmarks use: each list has a separate folder, so this environment stays as it is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows.row import Skip
from hvd_batchgrow.data.datasets.cache import cache_folder
from hvd_batchgrow.storage.atomic import new_folder
from hvd_batchgrow.storage.file_lock import locked


def installed(packages: tuple[str, ...]) -> Path:
    """Return a folder of the user's cache with packages, which pip fills once for each list of them.

    Args:
        packages: what pip installs, without their requirements.

    Raises:
        Skip: pip fails, or the cache cannot be written.
    """
    folder = cache_folder() / "peers" / "+".join([*packages, f"python{sys.version_info[0]}.{sys.version_info[1]}"])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                with new_folder(folder) as work:
                    _install(packages, work)
    except OSError as error:
        raise Skip(f"{packages[0]} cannot be installed in {folder}: {error.strerror or error}") from None
    return folder


def _install(packages: tuple[str, ...], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Skip(f"pip cannot install {packages[0]}: {lines[-1]}")


def imported(packages: tuple[str, ...], *modules: str) -> list[Any]:
    """Import modules of packages, which are installed first if necessary.

    Args:
        packages: as `installed` takes them.
        modules: full names.

    Raises:
        Skip: the packages cannot be installed, or a module cannot be imported.
    """
    if (folder := str(installed(packages))) not in sys.path:
        sys.path.append(folder)
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise Skip(f"{packages[0]} cannot be imported: {error}") from None
