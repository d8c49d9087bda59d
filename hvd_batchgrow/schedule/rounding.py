"""Rounding by a rule. A tie rounds up; the last digit of a float never decides.

A job file holds decimal numbers, and floats only come close to them: 160 · 1.3 is 208, a tie between 6 and 7 ghost
batches of 32, but in floating point it may lie on either side. Counts that follow from one product are therefore worked
out with fractions. A batch, which may follow from a thousand factors, counts as a tie where its float is one to 1e-12.
"""

from __future__ import annotations

import math
from fractions import Fraction

_RELATIVE_ERROR = 1e-12
"""More than the floating-point error of a batch that follows from a thousand factors, 1e-13."""


def decimal(number: float) -> Fraction:
    """The decimal number that a float was written as: 1.3 is 13/10, not the binary fraction next to it."""
    return Fraction(str(number))


def half_up(value: float) -> int:
    """The whole number nearest to a value >= 0; the larger of two that are equally near."""
    whole = math.floor(value)
    return whole + (value - whole >= 0.5 - min(1e-3, _RELATIVE_ERROR * value))


def whole_multiples(value: float) -> int:
    """The largest whole number that is not above a value >= 0, to floating-point error."""
    nearest = round(value)
    return nearest if math.isclose(nearest, value, rel_tol=_RELATIVE_ERROR) else math.floor(value)


def samples_at(epoch: float, num_samples: int) -> int:
    """The sample counter at an epoch: epoch × N to the nearest sample, a tie up.

    A float stands for all numbers that it is the nearest float to. If one of them is a tie, the upper one counts.
    """
    largest = Fraction(epoch) + Fraction(math.ulp(epoch)) / 2
    return math.floor(largest * num_samples + Fraction(1, 2))


def periods_done(samples: int, every_epochs: float | Fraction, num_samples: int) -> int:
    """How many whole periods of so many epochs lie between sample 0 and a sample counter."""
    period = every_epochs if isinstance(every_epochs, Fraction) else decimal(every_epochs)
    return samples * period.denominator // (period.numerator * num_samples)


def period_ends(before: int, samples: int, every_epochs: float | Fraction, num_samples: int) -> bool:
    """Whether a multiple of so many epochs lies after one sample counter and not after another."""
    done_before, done = (periods_done(s, every_epochs, num_samples) for s in (before, samples))
    return done > done_before
