"""What the repository keeps of a run: its records without weights, as one compressed file."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from hvd_batchgrow.storage.atomic import write_atomically

ENDING = ".tar.xz"
_KEPT = ("plan.json", "record.json", "metrics.jsonl", "decisions.jsonl", "branches.jsonl")
"""Without outcomes.npz, which has a number for each test sample and would be four fifths of the bytes."""


def pack(run: Path, folder: Path) -> None:
    """Write the records of a run to `folder`/NAME.tar.xz; the same records give the same bytes.

    Raises:
        OSError: a file cannot be read or written.
    """
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz") as archive:
        for path in filter(Path.is_file, (run / name for name in _KEPT)):
            entry = tarfile.TarInfo(f"{run.name}/{path.name}")
            data = path.read_bytes()
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{run.name}{ENDING}", content.getvalue())


def unpack(packed: Path, folder: Path) -> Path:
    """Extract the records of a run, and return its folder there."""
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(ENDING)
