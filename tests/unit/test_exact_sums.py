from __future__ import annotations

import math
import operator
from fractions import Fraction
from functools import reduce

import pytest
import torch

from hvd_batchgrow.train.update.exact_sums import LIMIT, join, split


def values(count: int = 4000) -> torch.Tensor:
    """Gradients of very different sizes, with cancellations."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** (torch.rand(count, generator=generator) * 12 - 9)
    return torch.randn(count, generator=generator) * sizes


def test_a_sum_is_the_same_in_any_order_and_cut() -> None:
    parts = split(values()[:, None])
    whole = parts.sum(1)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(4000, generator=generator)
        pieces = parts[:, order].tensor_split(1 + seed % 7, dim=1)
        total = torch.zeros(2, 2, dtype=torch.float64)
        for piece in reversed(pieces):
            total += piece.sum(1)
        assert torch.equal(total, whole)


def test_a_plain_float64_sum_is_not() -> None:
    # so that the test above can fail
    plain = values().double()
    orders = [plain[torch.randperm(4000, generator=torch.Generator().manual_seed(seed))] for seed in range(20)]
    assert len({reduce(operator.add, order.tolist()) for order in orders}) > 1


def test_the_sum_is_right_to_the_fine_grid() -> None:
    exact = sum((Fraction(v) for v in values().double().tolist()), Fraction(0))
    assert (
        abs(Fraction(float(join(split(values()[:, None]).sum(1)))) - exact)
        <= 4000 * Fraction(2) ** -71 + abs(exact) / 2**52
    )


def test_float32_values_of_common_size_are_kept_whole() -> None:
    for value in (0.0, 1.0, -0.1, 3e-10, 2.0**17 + 0.25, -(2.0**-40)):
        tensor = torch.tensor([value])
        assert join(split(tensor)).item() == tensor.double().item()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_finite_in_the_sum(value: float) -> None:
    assert not join(split(torch.tensor([[value], [1.0]])).sum(1)).isfinite().any()


def test_leaving_the_range_is_an_error() -> None:
    with pytest.raises(
        OverflowError, match=r"a sum of absolute values is 2.62e\+05; in exact mode it must be below 262144"
    ):
        join(split(torch.full((2, 1), LIMIT / 2)).sum(1))


def test_a_sum_that_leaves_the_range_and_comes_back_is_an_error_in_any_order() -> None:
    """Its last digits would depend on when it was out there."""
    terms = split(torch.tensor([[3e6, 0.0], [-3e6, 0.0], *([1e-3 * k / 7, 1.0] for k in range(200))]))
    for seed in range(20):
        total = torch.zeros(2, 3, dtype=torch.float64)
        for k in torch.randperm(202, generator=torch.Generator().manual_seed(seed)):
            total += terms[:, k]
        with pytest.raises(OverflowError, match=r"a sum of absolute values is 6e\+06"):
            join(total)


def test_the_largest_absolute_values_bound_the_sums_of_all_places() -> None:
    """Of 128 terms in two places each: they may use up the range, and no more than it."""
    within = torch.full((128, 2), LIMIT / 128 - 1)
    within[::2] *= -1
    assert join(split(within).sum(1)).tolist() == [0, 0]
    with pytest.raises(OverflowError):
        join(split(torch.where(torch.arange(128)[:, None] == 5, within + 128, within)).sum(1))
