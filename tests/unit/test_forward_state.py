"""State that a pass changes, apart from ghost norms: found, named, and independent of the layout."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_batchgrow.comm.int64_words import from_words, num_words, to_words
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.nn.state.forward_state import (
    ForwardState,
    StateFault,
    find_forward_state,
    restored_buffers,
    save_with_state_dict,
)
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch

GROUP, NUM_GROUPS = 4, 4
PHASE = Phase(0.0, 0.1, 0.9, GROUP * NUM_GROUPS, GROUP * NUM_GROUPS, start_samples=0, num_updates=10)
EXAMPLE = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A network whose forward first calls a function on itself and its input."""

    def __init__(self, act: Callable[[Any, Tensor], None] = lambda net, x: None, **buffers: Tensor) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.last, self.act = nn.Linear(6, 5), GhostBatchNorm1d(5, GROUP), nn.Linear(5, 3), act
        self.calls = 0
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def forward(self, x: Tensor) -> Tensor:
        self.act(self, x)
        return self.last(self.norm(self.first(x)).relu())  # type: ignore[no-any-return]


def average(net: Any, x: Tensor) -> None:
    if net.training:
        net.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)


def replaced(net: Any, x: Tensor) -> None:
    net.mean = 0.9 * net.mean + 0.1 * x.detach().mean(0)


def hidden_from_autograd(net: Any, x: Tensor) -> None:
    net.mean.data.add_(1)


def count(net: Any, x: Tensor) -> None:
    net.count += 1


def every_other(net: Any, x: Tensor) -> None:
    net.count += 1
    if net.count % 2 == 0:
        net.mean.add_(1)


def count_in_attribute(net: Any, x: Tensor) -> None:
    net.calls += 1


def keep_in_attributes(net: Any, x: Tensor) -> None:
    seen = net.__dict__.setdefault("seen", {"history": [torch.zeros(6)]})
    seen["history"][0] = 0.9 * seen["history"][0] + 0.1 * x.detach().mean(0)


class Meter:
    def __init__(self) -> None:
        self.total = 0.0


METER, LOGGER = Meter(), logging.getLogger("a network")


def keep_in_an_object(net: Any, x: Tensor) -> None:
    net.meter, net.logger, net.names = METER, LOGGER, ["a", "b"]
    net.meter.total += float(x.detach().sum())


def cache(net: Any, x: Tensor) -> None:
    net.last_input, net.size, net.weight_copy = x, x.shape, net.first.weight * 2


def count_in_evaluation(net: Any, x: Tensor) -> None:
    net.count += not net.training


MEAN, COUNT = torch.zeros(6), torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda net, x: None, ForwardState()),
        (cache, ForwardState()),
        (average, ForwardState(in_forward=("mean",), depends_on_samples=True)),
        (replaced, ForwardState(in_forward=("mean",), in_evaluation=("mean",), depends_on_samples=True)),
        (hidden_from_autograd, ForwardState(in_forward=("mean",), in_evaluation=("mean",))),
        (count, ForwardState(in_forward=("count",), in_evaluation=("count",))),
        (every_other, ForwardState(("count", "mean"), (), ("count",), depends_on_samples=True)),
        (count_in_attribute, ForwardState(attributes=("calls",))),
        (keep_in_an_object, ForwardState(attributes=("meter",))),
        (keep_in_attributes, ForwardState(attributes=("seen",))),
        (count_in_evaluation, ForwardState(in_evaluation=("count",))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_pass_changes_is_found_and_put_back(act: Callable[[Any, Tensor], None], expected: ForwardState) -> None:
    model = Net(act, mean=MEAN, count=COUNT)
    before = copy.deepcopy(model.state_dict())
    assert find_forward_state(model, EXAMPLE) == expected
    assert model.training
    assert model.calls == 0
    assert not hasattr(model, "seen")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def add_to_mean(net: Any, value: Tensor) -> None:
    net.mean += value


def test_a_buffer_that_only_the_backward_changes_is_found() -> None:
    model = Net(mean=MEAN)
    model.first.bias.register_hook(lambda gradient: add_to_mean(model, gradient.mean()))
    assert find_forward_state(model, EXAMPLE) == ForwardState(in_backward=("mean",), depends_on_samples=True)


@pytest.mark.parametrize("make", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_is_found_and_does_not_depend_on_samples(make: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)  # with this seed the power iteration has converged before the first forward
    state = find_forward_state(nn.Sequential(make(nn.Linear(6, 3))), EXAMPLE)
    assert len(state.in_forward) == 2  # u and v of the power iteration
    assert all(name.startswith("0.") for name in state.in_forward)
    assert not state.depends_on_samples
    assert (state.in_backward, state.in_evaluation, state.attributes) == ((), (), ())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_that_each_forward_computes_is_not_state() -> None:
    weight_norms = (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm)
    for model in (nn.Sequential(make(nn.Linear(6, 3))) for make in weight_norms):
        assert find_forward_state(model, EXAMPLE) == ForwardState()
    assert find_forward_state(Rows(nn.LSTM(6, 3)), EXAMPLE) == ForwardState()


class Rows(nn.Module):
    """A recurrent layer over sequences of one row."""

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[None])[0][0]  # type: ignore[no-any-return]


def initialize(net: Any, x: Tensor) -> None:
    if not net.count:
        net.first.bias.data.copy_(-x.mean(0)[:5])
        net.count.fill_(1)


def initialize_by_a_flag(net: Any, x: Tensor) -> None:
    if not net.calls:
        net.first.bias.data.copy_(-x.mean(0)[:5])
        net.calls = 1


@pytest.mark.parametrize("act", [initialize, initialize_by_a_flag])
def test_data_dependent_initialization_is_refused_and_undone(act: Callable[[Any, Tensor], None]) -> None:
    model = Net(act, count=COUNT)
    bias = model.first.bias.detach().clone()
    with pytest.raises(
        StateFault, match=r"a pass changes the parameters first\.bias, which only the optimizer may change"
    ):
        find_forward_state(model, EXAMPLE)
    assert torch.equal(model.first.bias, bias)
    assert (model.calls, int(model.count)) == (0, 0)  # type: ignore[arg-type]


def test_weights_that_a_forward_clamps_are_found_before_they_reach_the_limit() -> None:
    def clamp(net: Any, x: Tensor) -> None:
        limit = net.__dict__.setdefault("limit", float(net.first.weight.detach().abs().max()))
        net.first.weight.data.clamp_(-limit, limit)

    with pytest.raises(StateFault, match=r"a pass changes the parameters first\.weight"):
        find_forward_state(Net(clamp), EXAMPLE)


def test_a_buffer_that_changes_its_shape_is_refused_unless_it_is_a_cache() -> None:
    def grow(net: Any, x: Tensor) -> None:
        net.mean = torch.cat([net.mean, torch.zeros(1)])

    with pytest.raises(StateFault, match=r"a pass changes the shape of buffer mean from \(6,\) to \(7,\); give it"):
        find_forward_state(Net(grow, mean=MEAN), EXAMPLE)

    def build_once(net: Any, x: Tensor) -> None:
        net.table = torch.arange(6.0) if net.table is None else net.table

    model = Net(build_once)
    model.register_buffer("table", None, persistent=False)
    assert find_forward_state(model, EXAMPLE) == ForwardState()
    assert model.table is None
    model.register_buffer("table", None)
    with pytest.raises(StateFault, match=r"shape of buffer table from None to \(6,\)"):
        find_forward_state(model, EXAMPLE)


def test_notes_name_buffers_and_attributes() -> None:
    state = ForwardState(("a", "b", "c", "d"), (), ("e",), ("f",), depends_on_samples=True)
    fast, exact = ("\n".join(state.notes("nets:net", exact=exact)) for exact in (False, True))
    assert "nets:net changes buffers in training (a, b, c and 1 more)" in fast
    assert "nets:net changes buffers in evaluation (e): they are restored" in fast
    assert "changes attributes that are not buffers (f)" in fast
    assert "they depend on the micro-batch, unless layout.exact = true" in fast
    assert "they depend on the micro-batch" not in exact
    assert ForwardState().notes("nets:net", exact=False) == []


def test_buffers_are_restored_also_when_they_were_replaced() -> None:
    model = Net(replaced, mean=MEAN)
    with restored_buffers(model, ("mean",)):
        model(EXAMPLE)
        assert bool(model.mean.any())  # type: ignore[operator]
    assert torch.equal(model.mean, MEAN)  # type: ignore[arg-type]


def test_what_training_changes_goes_into_checkpoints() -> None:
    model = Net(average)
    model.register_buffer("mean", MEAN.clone(), persistent=False)
    assert "mean" not in model.state_dict()
    save_with_state_dict(model, find_forward_state(model, EXAMPLE).buffers)
    assert "mean" in model.state_dict()


# --- in updates -----------------------------------------------------------------------------------


def micro_batches(groups_per_pass: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(GROUP * NUM_GROUPS, 6, generator=generator)
    labels = torch.randint(0, 3, (GROUP * NUM_GROUPS,), generator=generator)
    size = groups_per_pass * GROUP
    return [
        MicroBatch(inputs[k : k + size], labels[k : k + size], tuple(range(k // GROUP, (k + size) // GROUP)))
        for k in range(0, len(inputs), size)
    ]


def updated(model: nn.Module, groups_per_pass: int = 1, **arguments: Any) -> UpdateEngine:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = UpdateEngine(model, optimizer, SingleRank(), **arguments)
    passes = micro_batches(groups_per_pass)
    engine.update(iter(passes), len(passes), PHASE, NUM_GROUPS)
    return engine


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("act", [average, replaced])
def test_an_update_keeps_the_buffers_after_ghost_batch_0(act: Callable[[Any, Tensor], None], known: bool) -> None:
    model = Net(act, mean=torch.ones(6), count=COUNT)
    registered = model.mean
    state = find_forward_state(model, EXAMPLE) if known else None
    updated(model, exact=True, forward_state=state)
    expected = 0.9 * torch.ones(6) + 0.1 * micro_batches(1)[0].inputs.mean(0)
    torch.testing.assert_close(model.mean, expected)
    assert model.mean is registered  # other objects may refer to it too


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.complex128])
def test_buffers_of_any_type_reach_other_ranks_bit_identically(dtype: torch.dtype) -> None:
    values = [torch.tensor([-0.0, 1.5, torch.nan]).to(dtype), torch.ones((), dtype=dtype), torch.zeros(0, dtype=dtype)]
    sent = torch.cat([to_words(value) for value in values])
    parts = (sent + torch.zeros_like(sent)).split([num_words(value) for value in values])  # like a sum over two ranks
    for value, part in zip(values, parts, strict=True):
        arrived = from_words(part, value)
        assert arrived.shape == value.shape
        assert arrived.reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


def test_every_pass_starts_from_the_same_values() -> None:
    seen: list[int] = []

    def note(net: Any, x: Tensor) -> None:
        seen.append(int(net.count))
        net.count += 1

    model = Net(note, count=COUNT)
    updated(model)
    assert seen == [0, 0, 0, 0]
    assert int(model.count) == 1  # type: ignore[arg-type]


def test_a_skipped_update_leaves_no_trace() -> None:
    model = Net(average, mean=MEAN)
    passes = micro_batches(1)
    passes[-1].inputs[0, 0] = torch.inf
    engine = UpdateEngine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), SingleRank(), rule=UpdateSection(on_nonfinite="skip")
    )
    assert engine.update(iter(passes), len(passes), PHASE, NUM_GROUPS).skipped
    assert torch.equal(model.mean, MEAN)  # type: ignore[arg-type]


def test_an_update_that_fails_leaves_no_trace_in_the_next() -> None:
    model = Net(average, mean=MEAN)
    engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=0.0), SingleRank())
    with pytest.raises(ValueError, match="ended after 1 of"):
        engine.update(iter(micro_batches(1)[:1]), NUM_GROUPS, PHASE, NUM_GROUPS)
    passes = micro_batches(1)
    engine.update(iter(passes), NUM_GROUPS, PHASE, NUM_GROUPS)
    torch.testing.assert_close(model.mean, 0.1 * passes[0].inputs.mean(0))


def test_a_buffer_of_the_backward_is_kept_after_ghost_batch_0() -> None:
    model = Net(mean=torch.zeros(5))
    gradients: list[Tensor] = []

    def watch(gradient: Tensor) -> None:
        gradients.append(gradient.clone())
        add_to_mean(model, gradient)

    model.first.bias.register_hook(watch)
    state = find_forward_state(model, EXAMPLE)
    gradients.clear()
    updated(model, forward_state=state)
    assert len(gradients) == NUM_GROUPS
    assert torch.equal(model.mean, gradients[0])  # type: ignore[arg-type]


class Spectral(nn.Module):
    """Spectral norm inside an activation checkpoint, or outside."""

    def __init__(self, *, repeated: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last, self.repeated = nn.Linear(6, 5), nn.Linear(5, 3), repeated
        nn.utils.parametrizations.spectral_norm(self.first)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self._hidden, x, use_reentrant=False) if self.repeated else self._hidden(x)
        return self.last(hidden)  # type: ignore[no-any-return]

    def _hidden(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()  # type: ignore[no-any-return]


@pytest.mark.parametrize("known", [True, False])
def test_a_checkpoint_around_a_changing_buffer_repeats_the_same_forward(known: bool) -> None:
    once, twice = (Spectral(repeated=repeated) for repeated in (False, True))
    if known:
        assert find_forward_state(twice, EXAMPLE).in_backward
    for model in (once, twice):
        updated(model, forward_state=find_forward_state(model, EXAMPLE) if known else None)
    for name, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name]), name
