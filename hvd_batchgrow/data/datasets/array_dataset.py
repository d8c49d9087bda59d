"""Checks and constructor shared by the sources whose samples are arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.class_labels import check_range, count_classes
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.datasets.plausibility import axis_hint, byte_hint
from hvd_batchgrow.messages.errors import RunError


def check_images(images: NDArray[Any], labels: NDArray[Any], place: str) -> None:
    """Raise RunError unless images are uint8, (N, H, W) or (N, H, W, C), with N > 0 labels of shape (N,)."""
    if images.dtype != np.uint8:
        raise RunError(f"{place}: images are {images.dtype}; they must be uint8{byte_hint(images)}")
    if images.ndim not in {3, 4}:
        raise RunError(f"{place}: images are {images.shape}; they must be (N, H, W) or (N, H, W, C)")
    check_pair(images, labels, place, "images")


def check_pair(values: NDArray[Any], labels: NDArray[Any], place: str, what: str) -> None:
    """Raise RunError unless there are as many values as labels, and no axis is empty."""
    if labels.ndim != 1 or len(values) != len(labels):
        hint = axis_hint(values, labels)
        raise RunError(f"{place}: {what} {values.shape} and labels {labels.shape} do not match{hint}")
    if not values.size:
        raise RunError(f"{place}: {what} {values.shape} are empty")


def with_channels(values: NDArray[Any]) -> NDArray[Any]:
    """Return gray images (N, H, W) as (N, H, W, 1), and other images and rows unchanged."""
    return values[..., None] if values.ndim == 3 else values


def int64_labels(labels: NDArray[Any], place: str) -> NDArray[np.int64]:
    """Return labels as int64. Raise RunError if they are not integers, or if a label does not fit."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise RunError(f"{place}: labels are {labels.dtype}; they must be integers{_integer_hint(labels)}")
    if labels.size and int(labels.max()) >= 1 << 62:
        raise RunError(f"{place}, entry {int(labels.argmax())} has the label {int(labels.max())}, which is not a class")
    return labels.astype(np.int64)


def _integer_hint(labels: NDArray[Any]) -> str:
    """Return the code that makes integers of labels, or the first label that is not one."""
    if labels.dtype.kind in "SU":
        number = "numpy.searchsorted(numpy.unique(train_labels), labels)"
        return f": numpy.save(…, {number}), with the train_labels for both files"
    if labels.dtype.kind == "f":
        wrong = np.flatnonzero(~np.isfinite(labels) | (labels != np.rint(labels)))
        if len(wrong):
            return f", and entry {wrong[0]} is {labels[wrong[0]]}"
    return ": numpy.save(…, labels.astype('int64'))"


def array_source(
    arrays: Mapping[str, NDArray[Any]],
    names: tuple[str, str],
    num_classes: int | None,
    label_names: tuple[str, str] | None = None,
    first: int | None = None,
) -> Datasets:
    """Return the source of arrays in memory or memory-mapped.

    Args:
        arrays: train_values, train_labels, test_values, test_labels, mean and std.
        names: of the training and of the test set, for messages.
        num_classes: None: the number that the training labels show.
        label_names: of the label files, for messages; None: the same as `names`.
        first: `DataSection.first_label`; None: as `first_label` decides.

    Raises:
        JobError: as `count_classes`.
        RunError: the two sets differ in sample shape, or a label is not among the classes.
    """
    labels = arrays["train_labels"], arrays["test_labels"]
    places = [partial("{}, entry {}".format, name) for name in label_names or names]
    first, num_classes = count_classes(labels[0], num_classes, places[0], first)
    check_range(labels[1], first, num_classes, places[1], "test")
    train, test = (
        ArrayDataset(with_channels(arrays[f"{part}_values"]), found - first if first else found, name)
        for part, found, name in zip(("train", "test"), labels, names, strict=True)
    )
    if train.shape != test.shape:
        raise RunError(f"{names[1]}: a test sample is {test.shape}, one of {names[0]} {train.shape}")
    mean, std = (tuple(map(float, arrays[key])) for key in ("mean", "std"))
    return Datasets(train, test, num_classes, mean, std, schema={"first_label": first})
