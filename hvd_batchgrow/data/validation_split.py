"""Hold out a part of the training set for validation, the same part in every layout and at every resume."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

import numpy as np

from hvd_batchgrow.config.split import num_held_out
from hvd_batchgrow.data.datasets.dataset import DatasetPair, Ids
from hvd_batchgrow.data.datasets.subset import Subset
from hvd_batchgrow.data.order.stream import keyed_permutation

_DOMAIN = 1
"""Separates the draw from those of the epochs, which have domain 0."""


def held_out_ids(num_samples: int, fraction: float, seed: int) -> Ids:
    """Return the ids of the validation samples, ascending: a pure function of seed, number of samples and fraction.

    The ids are a simple random sample without regard to classes. Those of a smaller fraction are among those of a
    larger one.

    Args:
        num_samples: of the source.
        fraction: in [0, 1); the number of ids is rounded up.
        seed: of the job.

    Returns:
        int64 (⌈fraction · num_samples⌉,).
    """
    draw = keyed_permutation(num_samples, seed, 0, _DOMAIN)
    return np.sort(draw(np.arange(num_held_out(num_samples, fraction), dtype=np.int64)))


def _without(before: Ids, ids: Ids) -> Ids:
    return ids + np.searchsorted(before, ids, side="right")


def with_validation(source: DatasetPair, fraction: float, seed: int) -> DatasetPair:
    """Return a source without its validation samples in the training set, but in `validation`.

    The remaining training samples keep their order. Only the validation ids are held in memory.

    Args:
        source: the samples; its constants remain those of the whole training set.
        fraction: `data.validation_fraction`, which leaves at least one training sample.
        seed: of the job.
    """
    held_out = held_out_ids(len(source.train), fraction, seed)
    # Before the training sample k there are as many validation samples as have at most k training samples before them.
    before = held_out - np.arange(len(held_out))
    train = Subset(source.train, len(source.train) - len(held_out), partial(_without, before))
    validation = Subset(source.train, len(held_out), partial(np.take, held_out))
    fingerprint = {"num_samples": len(held_out), "sha256": hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()}
    schema = {**source.schema, "validation": fingerprint}
    return replace(source, train=train, validation=validation, schema=schema)
