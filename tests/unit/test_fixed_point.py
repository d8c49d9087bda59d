from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import RanksLost, SingleRank
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.fixed_point import FixedPointSum
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.update.non_finite import NonFinite
from tests.helpers import small_job


def gradients(count: int, size: float = 1.0, length: int = 50) -> list[Tensor]:
    """Gradients of very different sizes, with cancellations."""
    generator = torch.Generator().manual_seed(0)
    sizes = size * 10.0 ** (torch.rand(count, length, generator=generator, dtype=torch.float64) * 8 - 8)
    return list((torch.randn(count, length, generator=generator) * sizes).float())


def add_up(numbers: FixedPointSum, terms: Sequence[Tensor]) -> bool:
    """Add the gradients of an update on one rank; return whether the sum is right."""
    numbers.begin(len(terms))
    for term in terms:
        numbers.add(term)
    return numbers.end(float(numbers.total[-1]))


def repetitions(numbers: FixedPointSum, terms: Sequence[Tensor]) -> int:
    """Repeat an update until its sum is right."""
    for count in range(10):
        if add_up(numbers, terms):
            return count
        assert numbers.resize(numbers.largest_word)
    raise AssertionError("repeated ten times")


def test_a_sum_is_the_same_in_any_order_and_over_any_ranks() -> None:
    terms = gradients(200)
    whole = FixedPointSum(terms[0])
    assert add_up(whole, terms)
    for seed in range(10):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed)).tolist()
        ranks = [FixedPointSum(terms[0]) for _ in range(1 + seed % 4)]
        for rank in ranks:
            rank.begin(200)
        for place, term in enumerate(order):
            ranks[place % len(ranks)].add(terms[term])
        assert torch.equal(torch.stack([rank.total for rank in ranks]).sum(0), whole.total)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_each_value_is_rounded_to_32_bits_of_the_largest_or_finer(size: float) -> None:
    """Whatever the gradients were before: 0 at the start of a run. Expected values in rational arithmetic."""
    terms = gradients(100, size)
    numbers = FixedPointSum(terms[0])
    assert repetitions(numbers, terms) <= 1
    mean = sum(Fraction(float(term.abs().max())) for term in terms) / 100
    for place, found in enumerate(numbers.values().tolist()):
        right = sum((Fraction(float(term[place])) for term in terms), Fraction(0))
        assert abs(Fraction(found) - right) <= 100 * mean * Fraction(1, 2**32)


def test_gradients_like_those_before_have_54_bits_less_one_for_each_doubling() -> None:
    """The figure in docs/invariance.md; the mean over the ghost batches has a bit less."""
    terms = gradients(128)
    numbers = FixedPointSum(terms[0])
    assert add_up(numbers, terms)
    assert add_up(numbers, terms)
    mean = sum(float(term.abs().max()) for term in terms) / 128
    right = sum((term.double() for term in terms), torch.zeros(50, dtype=torch.float64))
    assert float((numbers.values() - right).abs().max()) <= 128 * mean * 2.0 ** -(54 - 7)


@pytest.mark.parametrize(("factor", "repeats"), [(100.0, False), (1e5, True), (1e-2, False), (1e-9, True)])
def test_a_repetition_is_needed_only_after_a_large_change(factor: float, repeats: bool) -> None:
    before = gradients(8)
    numbers = FixedPointSum(before[0])
    for _ in range(2):
        assert add_up(numbers, before)
    assert add_up(numbers, [term * factor for term in before]) is not repeats


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e20])
@pytest.mark.parametrize("rest", [0.0, 1e-12, 1e-3])
def test_one_large_gradient_among_many_ends_the_repetitions(scale: float, rest: float) -> None:
    """The largest value alone would choose an exponent at which the mean has too few bits, forever."""
    terms = [torch.tensor([scale]), *[torch.tensor([rest * scale])] * 4095]
    assert repetitions(FixedPointSum(terms[0]), terms) <= 3


def test_gradients_of_zero_are_right_and_keep_the_magnitude() -> None:
    numbers = FixedPointSum(torch.zeros(3))
    numbers.magnitude = -5
    assert add_up(numbers, [torch.zeros(3)] * 4)
    assert numbers.magnitude == -5
    assert not numbers.values().any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -math.nan])
def test_what_is_not_finite_is_found_and_does_not_cause_a_repetition(value: float) -> None:
    numbers = FixedPointSum(torch.zeros(2))
    assert not add_up(numbers, [torch.tensor([1.0, value]), torch.ones(2)])
    assert not numbers.resize(numbers.largest_word)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_the_largest_value_whatever_its_sign(sign: float) -> None:
    words = []
    for value in (math.inf, math.nan):
        numbers = FixedPointSum(torch.zeros(1))
        numbers.begin(1)
        numbers._largest = torch.copysign(torch.tensor(value, dtype=torch.float64), torch.tensor(sign))
        words.append(numbers.largest_word)
    assert words[1] > words[0] > 0


def test_the_values_that_are_added_do_not_change() -> None:
    values = torch.full((3,), 0.7, dtype=torch.float64)
    add_up(FixedPointSum(values), [values])
    assert values.tolist() == [0.7] * 3


def test_more_ghost_batches_than_an_update_can_add_are_a_fault_of_the_job() -> None:
    job = small_job(
        layout={"exact": True}, model={"ghost_batch": 2}, schedule={"policy": "decay", "global_batch": 2**21 + 2}
    )
    with pytest.raises(JobError, match=r"layout\.exact: adds at most 1,048,576 ghost batches per update"):
        compile_plan(job, 1, 2**24)


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


@pytest.mark.parametrize("changes", [False, True])
def test_tensors_that_are_written_before_a_repetition_are_an_error(changes: bool) -> None:
    model, buffer = Scaled(), torch.empty(2, 3)
    engine = UpdateEngine(
        model, torch.optim.SGD(model.parameters(), lr=1.0), SingleRank(), forward=losses_of, exact=True
    )
    phase = Phase(0.0, 1.0, 0.0, 4, 4.0, start_samples=0, num_updates=1)

    def read() -> Iterator[MicroBatch]:
        for k in (0, 1):
            inputs = buffer if changes else torch.empty(2, 3)
            yield MicroBatch(inputs.fill_(1e9 * (k + 1)), None, (k,))

    if not changes:
        engine.update(read(), 2, phase, 2)
        return
    with pytest.raises(RunError, match="the tensors of its micro-batch 0 have been changed since it was read"):
        engine.update(read(), 2, phase, 2)


def test_an_update_in_which_ranks_are_lost_leaves_no_trace_in_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scaled()
    engine = UpdateEngine(
        model, torch.optim.SGD(model.parameters(), lr=1.0), SingleRank(), forward=losses_of, exact=True
    )
    phase = Phase(0.0, 1.0, 0.0, 2, 2.0, start_samples=0, num_updates=1)

    def lose(*_: object) -> None:
        raise RanksLost

    before = engine.state_dict()
    monkeypatch.setattr(engine.changing, "share", lose)
    with pytest.raises(RanksLost):
        engine.update(iter([MicroBatch(torch.full((2, 3), 1e9), None, (0,))]), 1, phase, 1)
    assert engine.state_dict() == before
    assert engine.buckets.magnitudes != before["gradient_magnitudes"]  # so that the test can fail


def test_magnitudes_of_other_buckets_are_left_to_the_first_update() -> None:
    model = Scaled()
    engine = UpdateEngine(
        model, torch.optim.SGD(model.parameters(), lr=1.0), SingleRank(), forward=losses_of, exact=True
    )
    before = engine.buckets.magnitudes
    engine.load_state_dict({**engine.state_dict(), "gradient_magnitudes": [90] * (len(before) + 1)})
    assert engine.buckets.magnitudes == before
    engine.load_state_dict({**engine.state_dict(), "gradient_magnitudes": [9] * len(before)})
    assert engine.buckets.magnitudes == [9] * len(before)
