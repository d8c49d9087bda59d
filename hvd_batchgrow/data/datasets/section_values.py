"""Values that several sources derive from `[data]`."""

from __future__ import annotations

from pathlib import Path

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.messages.suggest import near_folder


def need_root(data: DataSection, what: str, *, or_file: bool = False) -> Path:
    """Return the folder `data.root`.

    Args:
        data: the section.
        what: what the folder has, for the message.
        or_file: accept a file, such as an archive, instead of a folder.

    Raises:
        JobError: the job has no `data.root`.
        RunError: it is not a folder.
    """
    if data.root is None:
        raise JobError([Fault("data.root", f"is needed for the source {data.source!r}: {what}")])
    root = Path(data.root)
    if not (root.exists() if or_file else root.is_dir()):
        raise RunError(f"data.root = {data.root} is not a folder{near_folder(root)}")
    return root
