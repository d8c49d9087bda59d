"""The classes of a source: whether labels count from 0 or 1, how many classes there are, and which never occur."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.messages.wording import listed

Labels = NDArray[np.int64]
Where = Callable[[int], str]
"""Returns the location of a sample or of its label, for messages; see `Dataset.locate`."""

_NUM_SHOWN = 5


def first_label(labels: Labels, num_classes: int | None, where: Where = str) -> int:
    """Return 0 or 1, from which the labels count: ImageNet's own records hold 1 … 1000, most others 0 … C - 1.

    If no label is 0 and the largest is C, the job's number of classes, labels count from 1. Otherwise from 0.

    Args:
        labels: of the training set.
        num_classes: C; None: not in the job.
        where: returns the location of a label.

    Raises:
        JobError: C is not in the job, and no label is 0: the labels alone do not decide between 0 and 1.
    """
    low, high = int(labels.min()), int(labels.max())
    if low > 0 and num_classes is None:
        at = _at(labels, low, where)
        fault = f"is needed: training labels are {low} … {high}{at}. {high} if they count from 1, {high + 1} if from 0"
        raise JobError([Fault("data.num_classes", fault)])
    return int(low > 0 and high == num_classes)


def _at(labels: Labels, label: int, where: Where) -> str:
    place = where(int(np.argmax(labels == label)))
    return "" if where is str else f" ({place} has {label})"


def count_classes(labels: Labels, num_classes: int | None, where: Where, first: int | None = None) -> tuple[int, int]:
    """Return the smallest possible label, 0 or 1, and the number of classes.

    Args:
        labels: of the training set, (N,).
        num_classes: from the job; None: the largest label + 1, if every class up to it occurs.
        where: returns the location of a label.
        first: `DataSection.first_label`; None: as `first_label` decides.

    Raises:
        JobError: the job must name the number of classes, since a class below the largest label never occurs:
            a label may be wrong.
        RunError: a label is negative, or not among the classes.
    """
    if labels.min() < 0:
        _refuse(labels, labels < 0, "negative", where)
    first = first_label(labels, num_classes, where) if first is None else first
    if num_classes is None:
        num_classes = int(labels.max()) + 1
        _refuse_gaps(labels, num_classes, where)
    check_range(labels, first, num_classes, where, "training")
    return first, num_classes


def one_based_hint(least: int, largest: int, num_classes: int) -> str:
    """Return how to fix labels of a custom source that count from 1; empty if they do not seem to."""
    return f"; if your labels are 1 … {num_classes}, return label - 1" if least >= 1 and largest == num_classes else ""


def check_range(
    labels: Labels, first: int, num_classes: int, where: Where, what: str = "", *, is_custom: bool = False
) -> None:
    """Raise RunError, with the location of the first five, if labels are not in first … first + C - 1.

    Args:
        labels: (n,).
        first: 0 or 1.
        num_classes: C.
        where: returns the location of a label.
        what: "training" or "test", for the message; empty: the location says so.
        is_custom: of a custom source, whose labels are not shifted.
    """
    last = first + num_classes - 1
    wrong = (labels < first) | (labels > last)
    if wrong.any():
        hint = one_based_hint(int(labels.min()), int(labels.max()), num_classes) if is_custom else ""
        _refuse(labels, wrong, f"not in {first} … {last}", where, what and f" {what}", hint)


def _refuse(labels: Labels, wrong: NDArray[np.bool_], fault: str, where: Where, what: str = "", hint: str = "") -> None:
    places = np.flatnonzero(wrong).tolist()
    verb = "is" if len(places) == 1 else "are"
    shown = listed(places, _NUM_SHOWN, text=lambda k: f"{where(k)} has {labels[k]}", separator="; ")
    raise RunError(f"{len(places):,} of {len(labels):,}{what} labels {verb} {fault}: {shown}{hint}")


def _refuse_gaps(labels: Labels, num_classes: int, where: Where) -> None:
    present, counts = np.unique(labels, return_counts=True)
    if len(present) == num_classes:
        return
    top, samples = int(present[-1]), int(counts[-1])
    fault = f"is needed: labels are 0 … {top}, but {_never(present, num_classes)}"
    largest = f"the largest label, {top}, occurs in {samples:,} of {len(labels):,} samples{_at(labels, top, where)}"
    remedy = f"{num_classes} accepts classes without samples; if a label is wrong, correct it or remove its row"
    raise JobError([Fault("data.num_classes", f"{fault}; {largest}. {remedy}")])


def _never(present: Labels, num_classes: int, names: Sequence[str] = ()) -> str:
    """Return, for instance, `3 of 10 classes never occur in training: 2, 4, 5`."""
    count = num_classes - len(present)
    absent: list[int] = []
    for low, high in zip([-1, *present.tolist()], [*present.tolist(), num_classes], strict=True):
        absent += range(low + 1, min(high, low + 1 + _NUM_SHOWN - len(absent)))
    listed = _named(absent, names) + (", …" if count > len(absent) else "")
    return f"{count:,} of {num_classes:,} classes never {'occurs' if count == 1 else 'occur'} in training: {listed}"


def _named(classes: Sequence[int], names: Sequence[str]) -> str:
    return ", ".join(repr(names[k]) if k < len(names) else str(k) for k in classes)


def notes_on_classes(
    train: Labels, others: Mapping[str, Labels], num_classes: int, names: Sequence[str] = ()
) -> tuple[str, ...]:
    """Name the classes, from 0, that never occur in training, and which of them occur in the other sets.

    Args:
        train: labels, (N,).
        others: labels of the validation and test sets, by the name of the set.
        num_classes: C.
        names: of the classes; empty: they have no names.
    """
    present = np.unique(train)
    if len(present) == num_classes:
        return ()
    also = ""
    for name, labels in others.items():
        if len(found := np.setdiff1d(np.unique(labels), present)):
            more = ", …" if len(found) > _NUM_SHOWN else ""
            also += f"; {name} samples have {_named(found[:_NUM_SHOWN].tolist(), names)}{more}"
    return (f"{_never(present, num_classes, names)}{also}",)
