"""Values that several sources derive from `[data]`."""

from __future__ import annotations

from pathlib import Path

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.messages.errors import Fault, JobError


def need_root(data: DataSection, what: str) -> Path:
    """Return the path `data.root`.

    Args:
        data: the section.
        what: what the path should be, for the message.

    Raises:
        JobError: the job has no `data.root`.
    """
    if data.root is None:
        raise JobError([Fault("data.root", f"is needed for the source {data.source!r}: {what}")])
    return Path(data.root)
