"""Values that several sources derive from `[data]`."""

from __future__ import annotations

import math
from fractions import Fraction
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


def num_held_out(num_rows: int, fraction: float) -> int:
    """Return a fraction of the rows, rounded up: 0.2 of 581 012 rows is 116 203, which leaves 464 809 to train on.

    Args:
        num_rows: number of rows.
        fraction: used as the decimal that it was written as, so that 0.07 of 100 is 7.
    """
    return math.ceil(Fraction(repr(fraction)) * num_rows)
