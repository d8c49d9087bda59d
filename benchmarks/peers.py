"""Packages that only benchmarks use: each list has a separate folder, so this environment stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.rows.row import Skip


def installed(packages: tuple[str, ...]) -> Path:
    """Return a folder with packages, which is made once for each list of them. Raises Skip if pip fails.

    Args:
        packages: what pip installs, without their requirements.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd-batchgrow" / "peers"
    folder = base / "+".join([*packages, f"python{sys.version_info[0]}.{sys.version_info[1]}"])
    if folder.exists():
        return folder
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as unfinished:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", unfinished, *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise Skip(f"pip cannot install {packages[0]}: {lines[-1]}")
        os.rename(Path(unfinished), folder)
        Path(unfinished).mkdir()  # for the end of the block
    return folder
