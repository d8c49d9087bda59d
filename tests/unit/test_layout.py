from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.data.order.stream import ghost_batches_of_rank
from hvd_batchgrow.schedule.layout import Layout, divisors, form_layout, formable_ranks


@pytest.mark.parametrize(
    ("batch", "ranks", "limit", "expected"),
    [
        (128, 2, 64, Layout(2, 1, 64, uneven_ranks=False)),
        (128, 1, 64, Layout(1, 2, 64, uneven_ranks=False)),
        (128, 1, 1024, Layout(1, 1, 128, uneven_ranks=False)),
        # 25 ghost batches a rank: 5 are the most that fit in 384 and divide 25
        (3200, 2, 384, Layout(2, 5, 320, uneven_ranks=False)),
    ],
)
def test_the_fewest_equal_passes_that_fit(batch: int, ranks: int, limit: int, expected: Layout) -> None:
    assert form_layout(batch, ranks, 64, limit, uneven_ranks=False) == expected


def test_a_ragged_layout_counts_the_passes_of_the_fullest_rank() -> None:
    # 7 ghost batches on 2 ranks: 4 and 3; two a pass: 2 passes
    assert form_layout(7 * 8, 2, 8, 16, uneven_ranks=True) == Layout(2, 2, 16, uneven_ranks=True)


@pytest.mark.parametrize(
    ("batch", "ranks", "limit", "message"),
    [
        (
            640,
            3,
            64,
            "640 = 3 ranks × 3.33 ghost batches of 64; nearest: 576, 768; or 1, 2, 5 ranks; or layout.uneven_ranks",
        ),
        (100, 1, 64, "global batch 100 = 1.56 ghost batches of 64, which are never cut; nearest: 64, 128"),
        (32, 1, 64, "global batch 32 = 0.50 ghost batches of 64, which are never cut; nearest: 64"),
        (128, 3, 64, "128 = 2 ghost batches of 64 for 3 ranks: 1 would have nothing to do; nearest: 192, or 2 ranks"),
        (128, 1, 32, "max_micro_batch 32 = 0.50 ghost batches of 64, which are never cut; nearest: 64"),
    ],
)
def test_a_refusal_shows_the_arithmetic_and_what_would_work(batch: int, ranks: int, limit: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        form_layout(batch, ranks, 64, limit, uneven_ranks=False)


@given(groups=st.integers(1, 500), ranks=st.integers(1, 64), per_pass=st.integers(1, 20), group=st.integers(1, 64))
def test_every_layout_multiplies_out(groups: int, ranks: int, per_pass: int, group: int) -> None:
    batch = groups * group
    try:
        layout = form_layout(batch, ranks, group, per_pass * group, uneven_ranks=False)
    except ValueError as refusal:
        assert groups % ranks
        nearest = [int(n) for n in re.findall(r"\d+", str(refusal).split("nearest:")[1].split(";")[0].split("or")[0])]
        for batch_that_works in nearest:
            form_layout(batch_that_works, ranks, group, per_pass * group, uneven_ranks=False)
        return
    assert layout.ranks * layout.accumulation * layout.micro_batch == batch
    assert layout.micro_batch % group == 0
    assert layout.micro_batch <= per_pass * group


@given(groups=st.integers(1, 300), ranks=st.integers(1, 20), per_pass=st.integers(1, 9), first=st.integers(0, 1000))
def test_a_ragged_layout_has_room_for_every_group(groups: int, ranks: int, per_pass: int, first: int) -> None:
    if groups < ranks:
        return
    layout = form_layout(groups * 8, ranks, 8, per_pass * 8, uneven_ranks=True)
    shares = [len(ghost_batches_of_rank(first, groups, rank, ranks)) for rank in range(ranks)]
    assert sum(shares) == groups
    assert min(shares) >= 1
    assert layout.accumulation == -(-max(shares) * 8 // layout.micro_batch)


@given(number=st.integers(1, 5000), most=st.integers(1, 6000))
def test_divisors_are_those_that_divide(number: int, most: int) -> None:
    assert divisors(number, most) == [k for k in range(1, min(number, most) + 1) if number % k == 0]


def test_ranks_of_a_batch_of_any_size_are_found_without_trying_all() -> None:
    batch = 2**60 * 3
    assert next(formable_ranks(batch, 1 << 20, uneven_ranks=False)) == 1 << 20
    assert next(formable_ranks(batch, (1 << 20) - 1, uneven_ranks=False)) == 3 << 18
    assert list(formable_ranks(12, 5, uneven_ranks=False)) == [4, 3, 2, 1]
    assert list(formable_ranks(12, 5, uneven_ranks=True)) == [5, 4, 3, 2, 1]
    assert list(formable_ranks(0, 5, uneven_ranks=False)) == [1]
