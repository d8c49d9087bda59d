"""Random generators that are keyed by (seed, epoch, sample id), as the order and the crops of samples are."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import Ids
from hvd_batchgrow.data.order.philox import philox4x32

_DOMAIN = 1 << 31
"""Set in the last word of the counter, and never in that of `sample_draws`."""


def sample_words(seed: int, epochs: Ids, ids: Ids) -> NDArray[np.uint64]:
    """Return 128 random bits for each sample, a pure function of seed, epoch and sample id.

    Args:
        seed: of the run, below 2⁶³.
        epochs: (n,) epoch of each sample.
        ids: (n,) sample ids.

    Returns:
        (n, 4) words of 32 bits held in uint64.
    """
    counter = np.empty((4, len(ids)), dtype=np.uint64)
    counter[0], counter[1] = ids.astype(np.uint64) & np.uint64(0xFFFFFFFF), ids.astype(np.uint64) >> np.uint64(32)
    counter[2], counter[3] = epochs.astype(np.uint64), _DOMAIN
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).T


def numpy_generators(seed: int, epochs: Ids, ids: Ids) -> list[np.random.Generator]:
    """Return a NumPy generator for each sample, keyed by seed, epoch and sample id.

    Args:
        seed: of the run.
        epochs: (n,) epoch of each sample.
        ids: (n,) sample ids.
    """
    keys = [[_joined(words[:2]), _joined(words[2:])] for words in sample_words(seed, epochs, ids).tolist()]
    return [np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64))) for key in keys]


def seed_global_generators(words: Sequence[int]) -> None:
    """Seed the global generators of `random`, of NumPy and of torch on the CPU.

    It takes about 10 µs. NumPy and torch use 32 bits as their seeds.

    Args:
        words: 4 words of 32 bits, see `sample_words`.
    """
    random.seed(_joined(words[:2]))
    np.random.seed(words[2])
    torch.default_generator.manual_seed(words[3])


@contextmanager
def separate_generators() -> Iterator[None]:
    """Restore the global generators of `random`, of NumPy and of torch on the CPU at the end.

    Meanwhile torch computes with one thread, so that sums are bit-identical on any number of cores.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with restored_generators():
            yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def restored_generators() -> Iterator[None]:
    """Restore the global generators of `random`, of NumPy and of torch on the CPU at the end."""
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)


def _joined(words: Sequence[int]) -> int:
    return words[0] | words[1] << 32
