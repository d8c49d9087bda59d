from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvd_batchgrow.data.order.permutation import ROUNDS, Permutation
from hvd_batchgrow.data.order.stream import Stream, keyed_permutation

Order = NDArray[np.int64]


def random_keys(seed: int) -> Sequence[int]:
    return [int(key) for key in np.random.default_rng(seed).integers(0, 2**64, 2 * ROUNDS, dtype=np.uint64)]


@given(num_entries=st.integers(1, 3000), seed=st.integers(0, 1000))
def test_every_number_comes_once(num_entries: int, seed: int) -> None:
    order = Permutation(num_entries, random_keys(seed))(np.arange(num_entries))
    assert (np.sort(order) == np.arange(num_entries)).all()


@pytest.mark.parametrize("num_entries", [1 << 13, (1 << 13) + 1, 181**2, 60_000])
def test_every_number_comes_once_across_blocks_and_squares(num_entries: int) -> None:
    order = Permutation(num_entries, random_keys(1))(np.arange(num_entries))
    assert (np.bincount(order, minlength=num_entries) == 1).all()


@pytest.mark.parametrize("num_entries", [10**9, 2**60])
def test_a_large_one_is_entered_anywhere_without_an_array(num_entries: int) -> None:
    where = np.array([0, num_entries // 2, num_entries - 1])
    tracemalloc.start()
    order = Permutation(num_entries, random_keys(2))(where)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert ((order >= 0) & (order < num_entries)).all()
    assert len(set(order.tolist())) == 3


def test_odd_permutations_are_as_frequent_as_even_ones() -> None:
    """With two odd sides all would be even. Of 100 fair ones 50 ± 5 are odd, and 30 to 70 is 4 σ."""
    num_odd = 0
    for seed in range(100):
        order = keyed_permutation(9, seed, 0)(np.arange(9)).tolist()
        num_odd += sum(later < earlier for earlier, later in combinations(order, 2)) % 2
    assert 30 <= num_odd <= 70


# --- quality, beside that of numpy.random.Generator.permutation: the same limits hold for both ----------


def ours(num_entries: int, epoch: int) -> Order:
    return Stream(num_entries, 11).ids(epoch * num_entries, (epoch + 1) * num_entries)


def numpys(num_entries: int, epoch: int) -> Order:
    return np.random.default_rng([11, epoch]).permutation(num_entries)


def chi_square_z(counts: NDArray[np.int64]) -> float:
    """Return the chi-square statistic of equally likely cells, in standard deviations from its mean."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


both = pytest.mark.parametrize("orders", [ours, numpys], ids=["ours", "numpy"])
Orders = Callable[[int, int], Order]


@pytest.mark.slow
@both
def test_all_orders_of_few_entries_are_equally_likely(orders: Orders) -> None:
    for num_entries in (2, 3, 4, 5):
        numbers = {order: k for k, order in enumerate(permutations(range(num_entries)))}
        found = [numbers[tuple(orders(num_entries, epoch).tolist())] for epoch in range(4000)]
        assert abs(chi_square_z(np.bincount(found, minlength=len(numbers)))) < 4


@both
def test_a_place_holds_any_sample_and_a_sample_is_at_any_place(orders: Orders) -> None:
    """Count pairs (tenth of the positions, tenth of the samples) over many epochs."""
    num_entries, counts = 1000, np.zeros((10, 10), dtype=np.int64)
    for epoch in range(300):
        np.add.at(counts, (np.arange(num_entries) // 100, orders(num_entries, epoch) // 100), 1)
    # The sums of rows and columns are fixed in each epoch, which leaves 81 of the 99 degrees of freedom.
    expected = counts.sum() / 100
    statistic = float(((counts - expected) ** 2 / expected).sum()) * (num_entries - 1) / num_entries
    assert abs(statistic - 81) < 4 * (2 * 81) ** 0.5


@both
@pytest.mark.parametrize("lag", [1, 2, 7, 224, 225])  # 224 · 224 is where 50 000 is cut in two
def test_neighbors_do_not_correlate(orders: Orders, lag: int) -> None:
    num_entries = 50_000
    order = orders(num_entries, 0).astype(float)
    # Of a random permutation a serial correlation has mean -1/(n-1) and variance near 1/n.
    correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
    assert abs(correlation + 1 / (num_entries - 1)) < 4 / num_entries**0.5


@both
def test_steps_between_neighbors_spread_as_they_should(orders: Orders) -> None:
    """(next - this) mod N is uniform over 1 … N-1, which is not so for a lattice."""
    num_entries = 60_000
    steps = np.diff(orders(num_entries, 3)) % num_entries
    assert abs(chi_square_z(np.bincount(steps * 200 // num_entries, minlength=200))) < 4


@both
def test_epochs_are_independent(orders: Orders) -> None:
    first, second = (np.argsort(orders(20_000, epoch)) for epoch in (0, 1))
    counts = np.zeros((20, 20), dtype=np.int64)
    np.add.at(counts, (first // 1000, second // 1000), 1)
    assert abs((chi_square_z(counts) * (2 * 399) ** 0.5 + 399 - 361) / (2 * 361) ** 0.5) < 4
