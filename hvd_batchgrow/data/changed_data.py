"""Compare what two runs, or the ranks of one, have recorded about their data; without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_TOLERANCE = 1e-5
"""Largest difference of mean and std, in units of std, that is attributed to rounding: another machine or number of
threads may sum in another order, in float32 if a user's code does so. The normalized values change as little."""
_TOLERANCE_OF_SUMS = 1e-3
"""Largest relative difference of sums that is attributed to rounding: a user's transform may round in another way on
another machine."""
_CONSTANTS = (("mean", "std", "features"), ("target_mean", "target_std", "classes"))
"""Keys of a mean, of its std, and of the names of its entries."""
_DIGESTS = {"targets_sha256": "the targets", "images_sha256": "the image files"}

Summary = dict[str, list[Any]]
"""What is compared of a set of samples, with its names for messages; see `sample_summary`."""


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what differs between two training sets beyond rounding, each with both values, for messages.

    Args:
        before: `fingerprint` and the schema of the source, perhaps read from a file; keys may be missing.
        now: the same of the other set.

    Raises:
        TypeError, ValueError: the values were not written by `fingerprint`.
    """
    found = [change for keys in _CONSTANTS for change in _changed_constants(before, now, *keys)]
    for key, what in _DIGESTS.items():
        if key in before and key in now and before[key] != now[key]:
            found.append((f"{what} (SHA-256)", f"{str(before[key])[:12]}…", f"{str(now[key])[:12]}…"))
    return found


def _changed_constants(
    before: Mapping[str, Any], now: Mapping[str, Any], mean: str, std: str, names: str
) -> Iterator[tuple[str, str, str]]:
    keys = [key for key in (mean, std) if key in before and key in now and len(before[key]) == len(now[key])]
    values = {key: [np.array(tree[key], dtype=np.float64) for tree in (before, now)] for key in keys}
    scale = np.maximum(*values[std]) if std in values else 1.0
    for key, (was, found) in values.items():
        labels = now.get(names) or ()
        for k in np.flatnonzero(~(np.abs(found - was) <= _TOLERANCE * scale)).tolist():
            entry = f"{key} of {labels[k]!r}" if len(labels) == len(was) else f"{key}[{k}]"
            yield entry, f"{was[k]:.6g}", f"{found[k]:.6g}"


def changed_sets(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between the evaluation sets of two runs, such as "the test targets".

    Args:
        before: `evaluation_sets`, perhaps read from a file; sets may be missing.
        now: the same of the other run.

    Raises:
        TypeError, ValueError: the values were not written by `evaluation_sets`.
    """
    return [text for name in before if name in now for text in differences(before[name], now[name])]


def differences(ours: Summary, theirs: Summary) -> list[str]:
    """Return what differs between two summaries, for messages.

    Raises:
        TypeError, ValueError: a summary was read from a damaged file.
    """
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        raise TypeError("a summary is a dict")
    return [key for key in {**ours, **theirs} if not _alike(ours.get(key), theirs.get(key))]


def _alike(ours: Any, theirs: Any) -> bool:
    if not (isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs)):
        return bool(ours == theirs)
    if ours and isinstance(ours[0], float):
        (sum_a, size_a, finite_a), (sum_b, size_b, finite_b) = ours, theirs
        tolerance = _TOLERANCE_OF_SUMS * max(size_a, size_b)
        return bool(finite_a == finite_b and max(abs(sum_a - sum_b), abs(size_a - size_b)) <= tolerance)
    return all(map(_alike, ours, theirs))
