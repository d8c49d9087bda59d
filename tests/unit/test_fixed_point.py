from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.fixed_point import FixedPoint
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.update.non_finite import NonFinite


def gradients(count: int, size: float = 1.0, length: int = 50) -> list[Tensor]:
    """Gradients of very different sizes, with cancellations."""
    generator = torch.Generator().manual_seed(0)
    sizes = size * 10.0 ** (torch.rand(count, length, generator=generator, dtype=torch.float64) * 8 - 8)
    return list((torch.randn(count, length, generator=generator) * sizes).float())


def add_up(numbers: FixedPoint, terms: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(len(terms[0]) + 1, dtype=torch.int64)
    numbers.begin(len(terms))
    for term in terms:
        numbers.add(term, total)
    return total


def test_a_sum_is_the_same_in_any_order_and_over_any_ranks() -> None:
    terms = gradients(200)
    whole = add_up(FixedPoint(), terms)
    for seed in range(10):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed)).tolist()
        ranks = [torch.zeros_like(whole) for _ in range(1 + seed % 4)]
        numbers = FixedPoint()
        numbers.begin(200)
        for place, term in enumerate(order):
            numbers.add(terms[term], ranks[place % len(ranks)])
        assert torch.equal(sum(ranks, torch.zeros_like(whole)), whole)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_the_sum_is_right_to_the_grid_after_at_most_one_repetition(size: float) -> None:
    """Each term is rounded by at most half of 2⁻⁴⁵ of the largest value."""
    terms, numbers = gradients(100, size), FixedPoint()
    total = add_up(numbers, terms)
    if not numbers.fits(float(total[-1])):
        assert numbers.resize(numbers.largest_word)
        total = add_up(numbers, terms)
        assert numbers.fits(float(total[-1]))
    # Expected values in rational arithmetic.
    largest = max(float(term.abs().max()) for term in terms)
    error = 100 * Fraction(largest) * Fraction(1, 2**31)
    for place, found in enumerate(numbers.join(total).tolist()):
        right = sum((Fraction(float(term[place])) for term in terms), Fraction(0))
        assert abs(Fraction(found) - right) <= error


def test_gradients_like_those_before_have_46_bits_or_more() -> None:
    """Against the figure in the docs: 62 bits, less 8 of headroom and one per doubling of the ghost batches."""
    terms, numbers = gradients(128), FixedPoint()
    assert numbers.fits(float(add_up(numbers, terms)[-1]))
    total = add_up(numbers, terms)
    assert numbers.fits(float(total[-1]))
    mean = sum(float(term.abs().max()) for term in terms) / 128
    right = sum((term.double() for term in terms), torch.zeros(50, dtype=torch.float64))
    assert float((numbers.join(total) - right).abs().max()) <= 128 * mean * 2.0**-46


@pytest.mark.parametrize(("factor", "repeats"), [(100.0, False), (1e5, True), (1e-2, False), (1e-9, True)])
def test_a_repetition_is_needed_only_after_a_large_change(factor: float, repeats: bool) -> None:
    numbers, before = FixedPoint(), gradients(8)
    for _ in range(2):
        assert numbers.fits(float(add_up(numbers, before)[-1]))
    total = add_up(numbers, [term * factor for term in before])
    assert numbers.fits(float(total[-1])) is not repeats


def test_gradients_of_zero_fit_and_keep_the_size() -> None:
    numbers = FixedPoint(-5)
    total = add_up(numbers, [torch.zeros(3)] * 4)
    assert numbers.fits(float(total[-1]))
    assert numbers.size == -5
    assert not numbers.join(total).any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_does_not_fit_and_does_not_cause_a_repetition(value: float) -> None:
    numbers = FixedPoint()
    total = add_up(numbers, [torch.tensor([1.0, value]), torch.ones(2)])
    assert not numbers.fits(float(total[-1]))
    assert not numbers.resize(numbers.largest_word)


def test_the_values_that_are_added_do_not_change() -> None:
    values = torch.full((3,), 0.7, dtype=torch.float64)
    add_up(FixedPoint(), [values])
    assert values.tolist() == [0.7] * 3


def test_more_ghost_batches_than_the_bound_can_hold_are_an_error() -> None:
    with pytest.raises(ValueError, match="exact mode adds at most 1,048,576 ghost batches per update, not 1,048,577"):
        FixedPoint().begin(2**20 + 1)


class Scaled(nn.Module):
    """A loss whose gradient has a factor, and a buffer that each forward pass changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))
        self.factor = 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.add_(1)
        losses: Tensor = (inputs * self.weight).sum(1) * self.factor
        return losses


def losses_of(model: nn.Module, micro_batch: MicroBatch) -> Losses:
    return Losses(model(micro_batch.inputs))


def updates_of(model: Scaled, factors: Sequence[float], rule: UpdateSection | None = None) -> Iterator[Tensor]:
    """Yield the change of the weights by each update, with a factor on the loss of each."""
    engine = UpdateEngine(
        model, torch.optim.SGD(model.parameters(), lr=1.0), SingleRank(), forward=losses_of, exact=True, rule=rule
    )
    inputs = torch.arange(12.0).view(4, 3)
    phase = Phase(0.0, 1.0, 0.0, 4, 4.0, start_samples=0, num_updates=1)
    for factor in factors:
        model.factor = factor
        model.weight.data.zero_()  # the gradient does not depend on it
        engine.update((MicroBatch(inputs[k : k + 2], None, (k // 2,)) for k in (0, 2)), 2, phase, 2)
        yield -model.weight.detach()


def test_updates_whose_gradients_jump_are_right() -> None:
    factors = [1e-12, 1.0, 1e12, 1e-12]
    expected = torch.tensor([4.5, 5.5, 6.5])  # the mean of four rows
    model = Scaled().double()
    for factor, change in zip(factors, updates_of(model, factors), strict=True):
        torch.testing.assert_close(change / factor, expected.double(), rtol=1e-9, atol=0)
    assert model.calls == len(factors)  # a repetition starts from the buffers before the update


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_infinite_gradient_is_found(value: float) -> None:
    with pytest.raises(NonFinite):
        list(updates_of(Scaled(), [1.0, value]))
    skipped = UpdateSection(on_nonfinite="skip")
    assert [bool(change.any()) for change in updates_of(Scaled(), [1.0, value, 1.0], skipped)] == [True, False, True]


def test_a_repetition_reads_the_micro_batches_again() -> None:
    """`again` is called once for each repetition, and the update is that of its micro-batches."""
    model, calls = Scaled(), list[int]()
    model.weight.data.zero_()
    engine = UpdateEngine(
        model, torch.optim.SGD(model.parameters(), lr=1.0), SingleRank(), forward=losses_of, exact=True
    )
    phase = Phase(0.0, 1.0, 0.0, 2, 2.0, start_samples=0, num_updates=1)

    def read() -> Iterator[MicroBatch]:
        yield MicroBatch(torch.full((2, 3), 1e9), None, (0,))

    def again() -> Iterator[MicroBatch]:
        calls.append(1)
        return read()

    engine.update(read(), 1, phase, 1, again=again)
    assert calls == [1]
    assert model.weight.tolist() == [-1e9] * 3
