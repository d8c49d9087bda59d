"""`schedule.batch_steps`: pairs SAMPLES:BATCH such as "0:768 250K:1536", in Megatron-LM's syntax, with its unit."""

from __future__ import annotations

import re
from fractions import Fraction

from hvd_batchgrow.messages.wording import shown

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
"""Factor of each suffix of a count."""
_EXAMPLE = "0:768 250K:1536"
_MOST = 10**18


def parse_batch_steps(text: str, sequence_length: int = 1) -> list[tuple[int, int]]:
    """Turn "0:768 250K:1536" into [(0, 768), (250000, 1536)]: each sample count with the batch from there on.

    The suffixes K, M, B and T stand for 10³, 10⁶, 10⁹ and 10¹².

    Args:
        text: a text that `check_batch_steps` accepts.
        sequence_length: tokens of a sample, if the text counts tokens; a count is rounded down to whole samples, as in
            Megatron-LM. 1 if it counts samples.
    """
    pairs = (pair.split(":") for pair in text.split())
    return [((_count(count) or 0) // sequence_length, int(batch)) for count, batch in pairs]


def check_batch_steps(text: str) -> str:
    """Return the text. Raises ValueError if a part of it is wrong."""
    if (fault := _fault(text)) is None:
        return text
    raise ValueError(f"{fault}; example: {_EXAMPLE!r}")


def _count(text: str) -> int | None:
    """Return the count of a text, or None if the text is not a whole number."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,12})?)([KMBT]?)", text)
    value = Fraction(found[1]) * SUFFIXES[found[2]] if found else Fraction(-1)
    return int(value) if value.denominator == 1 and 0 <= value < _MOST else None


def _fault(text: str) -> str | None:
    pairs = text.split()
    for pair in pairs:
        samples, colon, batch = pair.partition(":")
        if not colon:
            return f"{shown(pair)} is not a pair SAMPLES:BATCH"
        if _count(samples) is None:
            near = f"; did you mean {samples.upper()}?" if _count(samples.upper()) is not None else ";"
            return f"{shown(samples)} is not a whole count of samples or tokens below 10¹⁸{near} suffixes: K, M, B, T"
        if not re.fullmatch("[0-9]{1,18}", batch):
            return f"{shown(batch)} is not a batch: write whole samples without a suffix"
    if not pairs or _count(pairs[0].partition(":")[0]) != 0:
        return "must be pairs SAMPLES:BATCH, the first from sample 0"
    return None
