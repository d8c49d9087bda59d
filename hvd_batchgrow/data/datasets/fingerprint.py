"""What the record of a run says about its training set, to notice that another run or a resume has a different one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.subset import whole_of
from hvd_batchgrow.data.datasets.targets import first_targets, value_schema

_TOLERANCE = 1e-5
"""Largest difference of mean and std, in units of std, that is attributed to rounding: another machine or number of
threads may sum in another order, in float32 if a user's code does so. The normalized values change as little."""
_CONSTANTS = (("mean", "std", "features"), ("target_mean", "target_std", "classes"))
"""Keys of a mean, of its std, and of the names of its entries."""
_DIGESTS = {"targets_sha256": "the targets", "images_sha256": "the image files"}


def fingerprint(source: Datasets) -> dict[str, Any]:
    """Return plain values that differ if the training set has changed; little is read that is not in memory.

    They are the mean and std of the samples and of targets that are numbers, and SHA-256 of class numbers or tokens
    and of the checksums of encoded images.
    """
    found: dict[str, Any] = {"mean": source.mean, "std": source.std}
    whole, targets = whole_of(source.train), _targets(source)
    if targets.dtype.kind in "iu":
        found["targets_sha256"] = _sha256(targets.astype("<i8"))
    elif targets.dtype.kind == "f" and targets.ndim == 2 and isinstance(whole.targets, np.ndarray):
        found |= {key: value for key, value in value_schema(targets).items() if key != "classes"}
    if (heads := getattr(whole, "heads", None)) is not None:
        found["images_sha256"] = _sha256(heads.astype("<u4"))
    return found


def _targets(source: Datasets) -> NDArray[Any]:
    """Return the first targets; none if they are the trees of a custom task."""
    try:
        found = first_targets(source.train)
    except (AttributeError, TypeError):
        found = None
    return found if isinstance(found, np.ndarray) else np.zeros(0)


def _sha256(values: Any) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


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
