"""How many samples a job holds out, known before the data is read."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from hvd_batchgrow.config.source_specs import SOURCES

if TYPE_CHECKING:  # it imports this file
    from hvd_batchgrow.config import DataSection


def num_held_out(num_rows: int, fraction: float) -> int:
    """Return a fraction of the rows, rounded up: 0.2 of 581 012 rows is 116 203, which leaves 464 809 to train on.

    Args:
        num_rows: number of rows.
        fraction: used as the decimal that it was written as, so that 0.07 of 100 is 7.
    """
    return math.ceil(Fraction(repr(fraction)) * num_rows)


def source_size(data: DataSection) -> int | None:
    """Return the number of training samples of the source, with those held out for validation; None: unknown."""
    spec = SOURCES.get(data.source)
    return data.num_samples or (spec.num_samples(data) if spec else None)


def may_have_validation(data: DataSection) -> bool:
    """Return whether a job may have a validation set: one that it holds out, or one that its own source returns."""
    return data.validation_fraction > 0 or SOURCES.get(data.source) is None


def num_validation(data: DataSection) -> int:
    """Return the number of samples that are held out for validation; 0 if the size of the source is unknown."""
    return num_held_out(source_size(data) or 0, data.validation_fraction)
