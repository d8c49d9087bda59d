"""Synthetic samples: a function of seed and id, without memory, which a network can learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import Dataset, Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.messages.errors import JobError
from tests.helpers import no_report


def load(source: str, seed: int = 7, **keys: Any) -> Datasets:
    return load_source(DataSection(source=source, **keys), seed, no_report)


def everything(samples: Dataset) -> tuple[NDArray[Any], NDArray[np.int64]]:
    ids = np.arange(len(samples))
    return samples.fetch(ids), samples.targets[ids]


synthetic = pytest.mark.parametrize("source", ["synthetic_images", "synthetic_rows"])


@synthetic
def test_a_synthetic_sample_is_a_function_of_seed_and_id_alone(source: str) -> None:
    count = 10**10  # labels in memory would be 80 GB
    train = load(source, num_samples=count).train
    ids = np.array([0, 5, 2**32 + 5, count - 1, 5])
    together = train.fetch(ids)
    again = load(source, num_samples=count).train
    for k, value, label in zip(ids, together, train.targets[ids], strict=True):
        assert (again.fetch(np.array([k]))[0] == value).all()
        assert again.targets[np.array([k])] == label
    assert len({value.tobytes() for value in together}) == 4
    other = load(source, seed=8, num_samples=count).train
    assert (other.fetch(ids) != together).any(axis=tuple(range(1, together.ndim))).all()
    assert train.fetch(ids[:0]).shape == (0, *train.shape)


@synthetic
def test_test_samples_are_others(source: str) -> None:
    made = load(source, num_samples=500, test_fraction=0.5, num_classes=3)
    assert len(made.test) == 250
    assert len(load(source, num_samples=500, num_classes=3).test) == 30  # at least ten for each class
    both = np.concatenate([everything(made.train)[0], everything(made.test)[0]]).reshape(750, -1)
    assert len(np.unique(both, axis=0)) == 750
    with pytest.raises(IndexError, match=r"ids 0 … 500 are not in 0 … 499"):
        made.train.fetch(np.array([0, 500]))


@synthetic
def test_synthetic_classes_are_even_and_can_be_learnt(source: str) -> None:
    values, labels = everything(load(source, num_samples=4000).train)
    # 400 each, with a deviation of √(4000 · 0.1 · 0.9) = 19
    assert np.abs(np.bincount(labels, minlength=10) - 400).max() < 4 * 19
    flat = values.reshape(4000, -1).astype(np.float64)
    centers = np.stack([flat[:2000][labels[:2000] == k].mean(axis=0) for k in range(10)])
    nearest = ((flat[2000:, None] - centers) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels[2000:]).mean() > 0.9


def test_synthetic_moments_are_those_of_its_samples() -> None:
    for source, axes, scale in (("synthetic_images", (0, 1, 2), 255), ("synthetic_rows", (0,), 1)):
        made = load(source, num_samples=2000)
        values = everything(made.train)[0] / scale
        assert made.mean == pytest.approx(values.mean(axis=axes), rel=1e-6, abs=1e-6)
        assert made.std == pytest.approx(values.std(axis=axes), rel=1e-5)


@pytest.mark.parametrize(("source", "shape"), [("synthetic_images", (5, 3, 1)), ("synthetic_rows", (1,))])
def test_synthetic_samples_have_any_shape(source: str, shape: tuple[int, ...]) -> None:
    train = load(source, num_samples=20, shape=shape, num_classes=2).train
    assert train.fetch(np.arange(20)).shape == (20, *shape)
    assert train.locate(3) == f"synthetic {train.kind}, number 3"


def test_synthetic_samples_need_a_number() -> None:
    with pytest.raises(JobError, match=r"data.num_samples: is needed"):
        load("synthetic_images")
