"""Hold out a part of the training set for validation or testing, the same part in every layout and at a resume."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from hvd_batchgrow.config.split import num_held_out
from hvd_batchgrow.data.datasets.dataset import Dataset, Datasets, Ids
from hvd_batchgrow.data.datasets.subset import Subset
from hvd_batchgrow.data.order.stream import keyed_permutation
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.wording import counted

_VALIDATION, _TEST = 1, 2
"""Domains that separate the two draws from each other and from the order of the epochs, which has domain 0."""


def held_out_ids(num_samples: int, fraction: float, seed: int, domain: int = _VALIDATION) -> Ids:
    """Return the ids of the held-out samples, ascending: a pure function of seed, number of samples and fraction.

    The ids are a simple random sample without regard to classes. Those of a smaller fraction are among those of a
    larger one.

    Args:
        num_samples: of the source.
        fraction: in [0, 1); the number of ids is rounded up.
        seed: of the job.
        domain: separates the draws of validation and test samples.

    Returns:
        int64 (⌈fraction · num_samples⌉,).
    """
    draw = keyed_permutation(num_samples, seed, 0, domain)
    return np.sort(draw(np.arange(num_held_out(num_samples, fraction), dtype=np.int64)))


def _without(before: Ids, ids: Ids) -> Ids:
    return ids + np.searchsorted(before, ids, side="right")


def with_validation(source: Datasets, fraction: float, seed: int) -> Datasets:
    """Return a source without its validation samples in the training set, but in `validation`.

    The remaining training samples keep their order. Only the validation ids are held in memory.

    Args:
        source: the samples; its constants remain those of the whole training set.
        fraction: `data.validation_fraction`, which leaves at least one training sample.
        seed: of the job.
    """
    train, validation, fingerprint = _divide(source.train, fraction, seed, _VALIDATION)
    return replace(source, train=train, validation=validation, schema={**source.schema, "validation": fingerprint})


def with_test(source: Datasets, fraction: float, seed: int) -> Datasets:
    """Return a source whose test set is a part of its training set, as `with_validation` draws one.

    Args:
        source: the samples; its test set is replaced.
        fraction: `data.test_fraction`, above 0.
        seed: of the job.

    Raises:
        JobError: no sample would be left to train on.
    """
    if num_held_out(len(source.train), fraction) >= len(source.train):
        fault = (
            f"{fraction:g} of {counted(len(source.train), 'sample')}, rounded up: no sample would be left to train on"
        )
        raise JobError([Fault("data.test_fraction", fault)])
    train, test, fingerprint = _divide(source.train, fraction, seed, _TEST)
    return replace(source, train=train, test=test, schema={**source.schema, "test": fingerprint})


def _divide(whole: Dataset, fraction: float, seed: int, domain: int) -> tuple[Subset, Subset, dict[str, Any]]:
    """Return the remaining samples, the held-out samples, and the fingerprint of the held-out samples."""
    held_out = held_out_ids(len(whole), fraction, seed, domain)
    # Before the remaining sample k there are as many held-out samples as have at most k remaining ones before them.
    before = held_out - np.arange(len(held_out))
    rest = Subset(whole, len(whole) - len(held_out), partial(_without, before))
    part = Subset(whole, len(held_out), partial(np.take, held_out))
    return (
        rest,
        part,
        {"num_samples": len(held_out), "sha256": hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()},
    )
