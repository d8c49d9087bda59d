from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.data.order.philox import philox4x32
from hvd_batchgrow.data.order.stream import (
    Stream,
    ghost_batches_left,
    ghost_batches_of_rank,
    keyed_permutation,
    micro_batches_of_rank,
    sample_draws,
)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Known answers published with Random123, philox4x32 of 10 rounds.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    lanes = np.array(counter, dtype=np.uint64)[:, None].repeat(3, axis=1)
    assert (philox4x32(lanes, key) == np.array(words, dtype=np.uint64)[:, None]).all()


@given(num_samples=st.integers(1, 60), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5))
def test_every_sample_comes_once_an_epoch(num_samples: int, seed: int, epoch: int) -> None:
    epochs, ids = Stream(num_samples, seed).at(np.arange(epoch * num_samples, (epoch + 1) * num_samples))
    assert sorted(ids) == list(range(num_samples))
    assert set(epochs) == {epoch}


@pytest.mark.slow
@given(cuts=st.lists(st.integers(0, 500), min_size=2, max_size=8), seed=st.integers(0, 100))
def test_an_entry_does_not_depend_on_how_the_stream_is_read(cuts: list[int], seed: int) -> None:
    cuts = sorted(cuts)
    whole = Stream(37, seed).ids(0, 500)
    stream = Stream(37, seed)
    for start, stop in reversed(list(pairwise(cuts))):
        assert (stream.ids(start, stop) == whole[start:stop]).all()


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(Stream(100, seed).ids(epoch * 100, epoch * 100 + 100)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ((10, 7, 3, 0), [7, 8, 9, 4, 3, 6, 0, 1, 2, 5]),
        ((10, 7 + (5 << 40), 3, 0), [5, 3, 7, 8, 6, 0, 4, 2, 1, 9]),
        ((10, 7, 3, 1), [0, 9, 8, 3, 6, 7, 2, 4, 1, 5]),
        ((10, 7, 2**33, 0), [5, 7, 0, 4, 8, 6, 3, 1, 2, 9]),
        ((7, 0, 0, 0), [5, 3, 4, 0, 6, 1, 2]),
    ],
)
def test_the_order_never_changes(key: tuple[int, int, int, int], order: list[int]) -> None:
    """A run resumed by a later version continues in the same order. Values of a separate program in plain integers."""
    assert keyed_permutation(*key)(np.arange(key[0])).tolist() == order


def test_draws_belong_to_the_sample_and_the_epoch() -> None:
    ids, epochs = np.array([5, 2**33 + 1, 5, 7, 1]), np.array([0, 0, 1, 0, 0])
    draws = sample_draws(3, epochs, ids, 6)
    assert draws.shape == (5, 6)
    assert ((draws >= 0) & (draws < 1)).all()
    for k in range(5):  # alone or among others: the same
        assert (sample_draws(3, epochs[k : k + 1], ids[k : k + 1], 6)[0] == draws[k]).all()
    assert len({tuple(row) for row in draws}) == 5
    assert (sample_draws(4, epochs, ids, 6) != draws).all()


@pytest.mark.parametrize("use", [1, 2, 3])
def test_no_use_repeats_the_draws_of_another(use: int) -> None:
    """A block is four draws: block k of use 0 must not be the first block of use k."""
    ids, epochs = np.arange(6), np.zeros(6, dtype=np.int64)
    first = sample_draws(3, epochs, ids, 24)
    assert (first[:, 4 * use : 4 * use + 4] != sample_draws(3, epochs, ids, 4, use)).all()


def test_draws_are_uniform() -> None:
    draws = sample_draws(0, np.zeros(20_000, dtype=np.int64), np.arange(20_000), 3)
    for column in draws.T:
        counts = np.bincount((column * 20).astype(int), minlength=20)
        # 19 degrees of freedom: a right generator is above 43.8 once in a thousand columns; the seed is fixed
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    correlations = np.asarray(np.corrcoef(draws.T))[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(20_000)


@given(first=st.integers(0, 1000), count=st.integers(0, 100), ranks=st.integers(1, 9))
def test_every_group_goes_to_one_rank_whatever_the_update(first: int, count: int, ranks: int) -> None:
    shares = [ghost_batches_of_rank(first, count, rank, ranks) for rank in range(ranks)]
    assert sorted(k for share in shares for k in share) == list(range(first, first + count))
    assert all(k % ranks == rank for rank, share in enumerate(shares) for k in share)


@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 7), st.integers(1, 5))
def test_the_rest_of_a_pass_is_what_its_micro_batch_has_from_a_ghost_batch_on(
    first_ghost_batch: int, num_ghost_batches: int, per_pass: int, ranks: int
) -> None:
    found = {
        group: ghost_batches_left(group, first_ghost_batch, num_ghost_batches, per_pass, ranks)
        for group in range(first_ghost_batch, first_ghost_batch + num_ghost_batches + 3)
    }
    expected = dict.fromkeys(range(first_ghost_batch + num_ghost_batches, first_ghost_batch + num_ghost_batches + 3), 0)
    for rank in range(ranks):
        for slots in micro_batches_of_rank(4 * first_ghost_batch, 4 * num_ghost_batches, 4, 4 * per_pass, rank, ranks):
            expected |= {first_ghost_batch + slot: len(slots) - k for k, slot in enumerate(slots)}
    assert found == expected
