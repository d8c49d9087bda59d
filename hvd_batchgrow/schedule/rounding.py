"""Rounding where ties round up, and the last digit of a float never decides.

A job file holds decimal numbers, which floats only approximate: 160 · 1.3 is 208, a tie between 6 and 7 ghost batches
of 32, but in floating point it may fall on either side. Counts from one product are therefore calculated with
fractions. A batch may be a product of a thousand factors; it counts as a tie if it is one to a relative 1e-12.
"""

from __future__ import annotations

import math
from fractions import Fraction

_RELATIVE_ERROR = 1e-12
"""Above the floating-point error of a product of a thousand factors, 1e-13."""


def decimal(number: float) -> Fraction:
    """Return the decimal number that a float was written as: 1.3 is 13/10, not the binary fraction next to it."""
    return Fraction(str(number))


def half_up(value: float) -> int:
    """Return the whole number nearest to a value >= 0; the larger of two that are equally near."""
    whole = math.floor(value)
    return whole + (value - whole >= 0.5 - min(1e-3, _RELATIVE_ERROR * value))


def whole_multiples(value: float) -> int:
    """Return the largest whole number that is not above a value >= 0, to floating-point error."""
    nearest = round(value)
    return nearest if math.isclose(nearest, value, rel_tol=_RELATIVE_ERROR) else math.floor(value)


def samples_at(epoch: float, num_samples: int) -> int:
    """Return the sample counter at an epoch: epoch × N, rounded to the nearest sample, ties up.

    A float represents all numbers that round to it. If one of them is a tie, the result is rounded up.
    """
    largest = Fraction(epoch) + Fraction(math.ulp(epoch)) / 2
    return math.floor(largest * num_samples + Fraction(1, 2))


def periods_done(samples: int, every_epochs: float | Fraction, num_samples: int) -> int:
    """Return the number of whole periods of `every_epochs` from sample 0 to a sample counter."""
    period = every_epochs if isinstance(every_epochs, Fraction) else decimal(every_epochs)
    return samples * period.denominator // (period.numerator * num_samples)


def period_ends(before: int, samples: int, every_epochs: float | Fraction, num_samples: int) -> bool:
    """Return whether a multiple of `every_epochs` is after the sample counter `before` and not after `samples`."""
    done_before, done = (periods_done(s, every_epochs, num_samples) for s in (before, samples))
    return done > done_before
