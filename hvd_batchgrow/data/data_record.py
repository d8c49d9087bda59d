"""What `record.json` says about the data of a run, to notice that another run or a resume has different data."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.subset import whole_of
from hvd_batchgrow.data.datasets.targets import first_targets, value_schema
from hvd_batchgrow.data.sample_summary import evaluation_sets


def data_record(source: Datasets) -> dict[str, Any]:
    """Return the schema of a source, the fingerprint of its training set, and summaries of its other sets."""
    return {**fingerprint(source), **source.schema, "evaluation_sets": evaluation_sets(source)}


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
