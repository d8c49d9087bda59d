"""What the sources share that are arrays: checks, and a source of the arrays of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.plausible import axis_hint, byte_hint
from hvd_batchgrow.data.samples import ArraySamples, Samples, Source, check_labels
from hvd_batchgrow.errors import RunError


def check_images(images: NDArray[Any], labels: NDArray[Any], place: str) -> None:
    """Images must be bytes, (N, H, W) or (N, H, W, C), with N > 0 labels, whole numbers (N,).

    Raises:
        RunError: they are not.
    """
    if images.dtype != np.uint8 or not np.issubdtype(labels.dtype, np.integer):
        found = f"images are {images.dtype} and labels {labels.dtype}"
        hint = "" if images.dtype == np.uint8 else byte_hint(images)
        raise RunError(f"{place}: {found}; images must be uint8 and labels whole numbers{hint}")
    if images.ndim not in {3, 4}:
        raise RunError(f"{place}: images are {images.shape}; they must be (N, H, W) or (N, H, W, C)")
    check_pair(images, labels, place, "images")


def check_pair(values: NDArray[Any], labels: NDArray[Any], place: str, what: str) -> None:
    """Values and labels must be as many, more than none, and nothing empty. Raises RunError if not."""
    if labels.ndim != 1 or len(values) != len(labels):
        hint = axis_hint(values, labels)
        raise RunError(f"{place}: {what} {values.shape} and labels {labels.shape} do not belong together{hint}")
    if not values.size:
        raise RunError(f"{place}: {what} {values.shape} hold nothing")


def with_channels(values: NDArray[Any]) -> NDArray[Any]:
    """Grey images (N, H, W) as (N, H, W, 1); other images and rows as they are."""
    return values[..., None] if values.ndim == 3 else values


def array_source(arrays: Mapping[str, NDArray[Any]], names: tuple[str, str], num_classes: int | None) -> Source:
    """A source of arrays that lie in memory or are mapped.

    Args:
        arrays: train_values, train_labels, test_values, test_labels, mean and deviation.
        names: of the training and of the test set, for messages.
        num_classes: None: as many as the training labels show.

    Raises:
        RunError: as `checked_source`.
    """
    train, test = (
        ArraySamples(with_channels(arrays[f"{part}_values"]), arrays[f"{part}_labels"], name)
        for part, name in zip(("train", "test"), names, strict=True)
    )
    return checked_source(train, test, (train.labels, test.labels), arrays, names, num_classes)


def checked_source(
    train: Samples,
    test: Samples,
    labels: tuple[NDArray[np.int64], NDArray[np.int64]],
    moments: Mapping[str, NDArray[Any]],
    names: tuple[str, str],
    num_classes: int | None,
) -> Source:
    """A source whose two sets have the same shape, and labels 0 … num_classes - 1. Raises RunError if they do not."""
    if train.shape != test.shape:
        raise RunError(f"{names[1]}: a test sample is {test.shape}, one of {names[0]} {train.shape}")
    num_classes = num_classes or int(labels[0].max()) + 1
    for part, name in zip(labels, names, strict=True):
        check_labels(part, num_classes, name)
    mean, deviation = (tuple(map(float, moments[key])) for key in ("mean", "deviation"))
    return Source(train, test, num_classes, mean, deviation)
