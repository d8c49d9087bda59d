"""Check the targets of a custom source: their type, shape and number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.config.task_specs import IGNORED_TOKEN, TargetKind
from hvd_batchgrow.data.datasets.class_labels import Where, check_range
from hvd_batchgrow.data.datasets.dataset import Dataset
from hvd_batchgrow.data.datasets.normalization import loses_digits
from hvd_batchgrow.data.datasets.subset import whole_of
from hvd_batchgrow.data.tensor_tree import map_tensors
from hvd_batchgrow.messages.errors import RunError

_MOST_COMPUTED = 10**6
"""Numbers in the targets that are computed for a check."""


def first_targets(samples: Dataset) -> Any:
    """Return all targets of an array, the first samples' computed targets, or a few of a torch Dataset.

    Targets of a torch Dataset that are a tree of tensors become the same tree of arrays.
    """
    if example := getattr(whole_of(samples), "example", None):
        return map_tensors(Tensor.numpy, example.targets)
    if isinstance(samples.targets, np.ndarray):
        return samples.targets
    width = np.asarray(samples.targets[np.arange(min(len(samples), 1))]).size
    return np.asarray(samples.targets[np.arange(min(len(samples), max(1, _MOST_COMPUTED // max(1, width))))])


def target_faults(samples: Dataset, target: TargetKind | None) -> list[str]:
    """Return why targets have the wrong type, shape or number.

    Args:
        samples: the set.
        target: that the task needs; None: any.
    """
    targets = first_targets(samples)
    shown = f"{targets.dtype} {targets.shape}"
    faults = []
    if target == "class" and (targets.dtype != np.int64 or targets.ndim != 1):
        faults.append(f"targets must be classes, int64 (n,), are {shown}")
    if target == "values" and (targets.dtype not in (np.float32, np.float64) or targets.ndim != 2):
        faults.append(f"targets must be numbers, float32 (n, K), are {shown}: targets.astype('float32').reshape(n, -1)")
    if target == "tokens" and (targets.dtype != np.int64 or targets.ndim != 2):
        faults.append(f"targets must be tokens, int64 (n, L), are {shown}")
    given: Any = samples.targets
    num_targets = len(given) if hasattr(given, "__len__") else len(samples)
    if num_targets != len(samples):
        faults.append(f"has {len(samples)} samples and {num_targets} targets")
    return faults


def check_target_values(samples: Dataset, num_classes: int, target: TargetKind | None, place: str) -> None:
    """Check that classes and tokens are in range, and that each sample has K finite numbers.

    Args:
        samples: the set, without `target_faults`.
        num_classes: `Datasets.num_classes`.
        target: that the task needs; None: any.
        place: for the message.

    Raises:
        RunError: with the first targets at fault and their number.
    """
    targets = first_targets(samples)
    if target == "class":
        check_class_range(targets, num_classes, partial("{}, sample {}".format, place))
    if target == "tokens":
        check_tokens(targets, num_classes, partial("{}, sample {}".format, place))
    if target == "values":
        check_numbers(targets, place)
        if targets.shape[1] != num_classes:
            raise RunError(f"{place}: a sample has {targets.shape[1]} targets, and num_classes is {num_classes}")


def check_class_range(targets: Any, num_classes: int, where: Where) -> None:
    """Raise RunError, with the first samples at fault and their number, unless classes (n,) are in 0 … C - 1."""
    check_range(targets, 0, num_classes, where, is_custom=True)


def check_tokens(targets: Any, num_classes: int, where: Where) -> None:
    """Raise RunError, with the first tokens at fault and their number, unless tokens (n, L) are in the vocabulary."""
    wrong = np.argwhere(((targets < 0) & (targets != IGNORED_TOKEN)) | (targets >= num_classes))
    if len(wrong):
        shown = "; ".join(f"{where(k)}, token {j} is {targets[k, j]}" for k, j in wrong[:5].tolist())
        rule = f"0 … {num_classes - 1}, or {IGNORED_TOKEN} where a token does not count"
        raise RunError(f"{len(wrong)} targets are not in {rule}: {shown}")


def check_numbers(targets: Any, place: str) -> None:
    """Raise RunError, with the first samples at fault and their number, unless all targets (n, K) are finite."""
    wrong = np.flatnonzero(~np.isfinite(targets).all(1))
    if len(wrong):
        shown = "; ".join(f"sample {k} has {targets[k].tolist()}" for k in wrong[:5])
        raise RunError(f"{place}: targets of {len(wrong)} of {len(targets)} samples are not finite: {shown}")


def as_float32(targets: NDArray[Any]) -> NDArray[np.float32]:
    """Return targets as float32; a number that is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return targets.astype(np.float32)


def check_digits(targets: NDArray[Any], place: str, names: Sequence[str] = ()) -> None:
    """Raise RunError if float32 represents the differences between the values of a target with too few digits.

    Args:
        targets: of the training set, (N, K); infinite ones are ignored.
        place: for the message.
        names: K names; empty: the message numbers them from 0.
    """
    for k, column in enumerate(targets.T):
        found = column[np.isfinite(as_float32(column))].astype(np.longdouble)
        if len(found) and loses_digits(found, np.float32, num_bits=10):
            name, error = repr(names[k]) if names else k, np.abs(found - found.astype(np.float32)).max()
            fault = f"target {name} has values from {found.min():.12g} to {found.max():.12g}"
            raise RunError(f"{place}: {fault}: float32 changes them by up to {error:.2g}; subtract a constant from it")


def value_schema(targets: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the schema of targets that are numbers: their names, and mean and std of the training targets.

    Args:
        targets: of the training set, (N, K).
        names: K names; empty: they are not named.
    """
    mean, std = targets.mean(0, dtype=np.float64), targets.std(0, dtype=np.float64)
    std = np.where(targets.min(0) == targets.max(0), 1.0, std)
    return {"classes": list(names), "target_mean": mean.tolist(), "target_std": std.tolist()}
