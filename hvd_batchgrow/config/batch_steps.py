"""`schedule.batch_steps`: pairs SAMPLES:BATCH such as "0:768 250K:1536", in Megatron-LM's syntax."""

from __future__ import annotations

import re
from fractions import Fraction

from hvd_batchgrow.messages.schema_messages import shown

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
"""What a suffix of a sample count multiplies it by."""
PATTERN = r"^\s*0[KMB]?:[0-9]{1,18}(\s+[0-9]{1,18}(\.[0-9]{1,9})?[KMB]?:[0-9]{1,18})*\s*$"
EXAMPLE = "0:768 250K:1536"
_MOST = 10**18
_MEANT = {"G": "B", "T": "000B"}
"""Suffixes that people write for those that there are."""


def parse_batch_steps(text: str) -> list[tuple[int, int]]:
    """Turn "0:768 250K:1536" into [(0, 768), (250000, 1536)]: a sample count, and the batch from there on.

    The suffixes K, M and B stand for 10³, 10⁶ and 10⁹ samples. Megatron-LM reads the counts as tokens where it knows
    the length of a sequence; here they are always samples.

    Args:
        text: one that `check_batch_steps` accepts.
    """
    pairs = (pair.split(":") for pair in text.split())
    return [(_count(samples) or 0, int(batch)) for samples, batch in pairs]


def check_batch_steps(text: str) -> str:
    """Return the text. Raises ValueError: it has a part that is wrong, with the nearest text that is right."""
    if (fault := _fault(text)) is None:
        return text
    near = _nearest(text)
    raise ValueError(f"{fault}; {'such as' if near is None else 'nearest'}: {shown(near or EXAMPLE)}")


def _count(text: str) -> int | None:
    """A sample count; None: the text is not one, or not a whole number."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([KMB]?)", text)
    value = Fraction(found[1]) * SUFFIXES[found[2]] if found else Fraction(-1)
    return int(value) if value.denominator == 1 and 0 <= value < _MOST else None


def _fault(text: str) -> str | None:
    pairs = text.split()
    for pair in pairs:
        samples, colon, batch = pair.partition(":")
        if not colon:
            return f"{shown(pair)} is not a pair SAMPLES:BATCH"
        if _count(samples) is None:
            kinds = "K, M or B for 10³, 10⁶ or 10⁹ samples (never tokens)"
            return f"{shown(samples)} is not a number of samples below 10¹⁸: write a whole number, or one with {kinds}"
        if not re.fullmatch("[0-9]{1,18}", batch):
            return f"{shown(batch)} is not a batch: write whole samples without a suffix"
    if not pairs or _count(pairs[0].partition(":")[0]) != 0:
        return "must be pairs SAMPLES:BATCH, the first from sample 0"
    return None


def _nearest(text: str) -> str | None:
    """A text that is right, with each part written as it was probably meant; None: that is not known."""
    pairs = [_meant(pair) for pair in text.split()]
    if pairs and _count(pairs[0].partition(":")[0]):
        pairs[0] = "0:" + pairs[0].partition(":")[2]
    near = " ".join(pairs)
    return near if _fault(near) is None else None


def _meant(pair: str) -> str:
    halves = pair.partition(":")[::2]
    samples, batch = (re.fullmatch(r"([0-9]*\.?[0-9]*)([A-Za-z]?)[A-Za-z]*", half) for half in halves)
    if not samples or not batch:
        return pair
    letter = _MEANT.get(samples[2].upper(), samples[2].upper())
    letter = letter if letter.lstrip("0") in SUFFIXES else ""
    whole = _count(batch[1] + _MEANT.get(batch[2].upper(), batch[2].upper()))
    return f"{samples[1]}{letter}:{batch[1] if whole is None else whole}"
