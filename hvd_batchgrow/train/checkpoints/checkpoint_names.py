"""File names of checkpoints; without torch, so that commands that only plan can list them."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"samples-(\d{15})\.pt")


def checkpoint_name(samples: int) -> str:
    """Return the file name of the checkpoint at a sample counter."""
    return f"samples-{samples:015d}.pt"


def saved_samples(folder: Path) -> list[int]:
    """Return the sample counters of the checkpoints in a run's checkpoint folder, ascending."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob("samples-*.pt"))
    return sorted(int(name[1]) for name in found if name)
