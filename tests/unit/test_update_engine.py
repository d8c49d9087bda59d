"""What an engine does with a model, an optimizer and passes that are not quite as they should be."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.nn.keyed_random import sample_keys
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.forward import MicroBatch
from tests import golden

GROUP, NUM_GROUPS = 4, 4
PHASE = Phase(0.0, 0.1, 0.9, GROUP * NUM_GROUPS, GROUP * NUM_GROUPS, start_samples=0, num_updates=10)


class Net(nn.Module):
    """Two norms, of which one may be kept in evaluation."""

    def __init__(self, *, still: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.other = nn.Linear(5, 6), GhostBatchNorm1d(6, GROUP), GhostBatchNorm1d(6, GROUP)
        self.last, self.still = nn.Linear(6, 3), still

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.norm.train(mode and not self.still)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.other(self.norm(self.first(x)).relu()))
        return out


def engine_of(model: nn.Module, **arguments: object) -> UpdateEngine:
    return UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), SingleRank(), **arguments)  # type: ignore[arg-type]


def passes(sizes: tuple[int, ...] = (2, 2), lacking: int = 0) -> list[MicroBatch]:
    generator, made, first = torch.Generator().manual_seed(5), [], 0
    for size in sizes:
        count = size * GROUP - lacking
        labels = torch.randint(0, 3, (count,), generator=generator)
        slots = tuple(range(first, first + size))
        made.append(MicroBatch(torch.randn(count, 5, generator=generator), labels, slots))
        first += size
    return made


def serve(engine: UpdateEngine, micro_batches: list[MicroBatch]) -> UpdateResult:
    return engine.update(iter(micro_batches), len(micro_batches), PHASE, NUM_GROUPS)


def test_a_micro_batch_must_have_the_samples_of_its_ghost_batches() -> None:
    """Otherwise the sum of their losses would be divided by the wrong batch."""
    for micro_batches in (passes(lacking=2), passes(lacking=GROUP)):
        with pytest.raises(
            ValueError, match=r"micro-batch of 2 ghost batches of 4; it must return the loss of each sample, \(8,\)"
        ):
            serve(engine_of(nn.Linear(5, 3)), micro_batches)
    nowhere = [MicroBatch(part.inputs, part.targets, ()) for part in passes()]
    with pytest.raises(ValueError, match="micro-batch of 0 ghost batches"):
        serve(engine_of(nn.Linear(5, 3)), nowhere)


def test_ghost_batches_processed_twice_or_never_raise_before_the_step() -> None:
    one, two = passes()
    for micro_batches, message in (
        (
            [one],
            r"each of the update's 4 ghost batches must be processed exactly once, but 2 were not: "
            r"ghost batch 2: 0 times, ghost batch 3: 0 times$",
        ),
        ([one, one], r"but 4 were not: ghost batch 0: 2 times, .* 1: 2 times, .* 2: 0 times, .* 3: 0 times$"),
        ([one, two, two], r"but 2 were not: ghost batch 2: 2 times, ghost batch 3: 2 times$"),
    ):
        engine = engine_of(nn.Linear(5, 3))
        before = copy.deepcopy(engine.model.state_dict())
        engine.measure_noise()
        with pytest.raises(ValueError, match=message):
            serve(engine, micro_batches)
        assert all(torch.equal(value, before[name]) for name, value in engine.model.state_dict().items())
        assert not serve(engine, [one, two]).skipped
    beyond = MicroBatch(two.inputs, two.targets, (3, 4))
    with pytest.raises(ValueError, match=r"slots \[4\] must be in 0 … 3: the update has 4 ghost batches"):
        serve(engine_of(nn.Linear(5, 3)), [one, beyond])


def test_too_few_micro_batches_raise() -> None:
    engine = engine_of(nn.Linear(5, 3))
    with pytest.raises(ValueError, match="num_micro_batches = 0: must be at least 1 on each rank"):
        serve(engine, [])
    with pytest.raises(ValueError, match="ended after 1 of the update's 2"):
        engine.update(iter(passes()[:1]), 2, PHASE, NUM_GROUPS)


def test_a_mean_in_the_place_of_losses_is_refused() -> None:
    def forward(model: nn.Module, micro_batch: MicroBatch) -> Losses:
        return Losses(nn.functional.cross_entropy(model(micro_batch.inputs), micro_batch.targets))

    with pytest.raises(ValueError, match=r"losses of shape \(\) for .*reduction='none'"):
        serve(engine_of(nn.Linear(5, 3), forward=forward), passes())

    def without_losses(model: nn.Module, micro_batch: MicroBatch) -> Any:
        return forward(model, micro_batch).each

    with pytest.raises(ValueError, match=r"forward returned Tensor; it must return Losses\(each\), a loss of each"):
        serve(engine_of(nn.Linear(5, 3), forward=without_losses), passes())


@pytest.mark.parametrize(
    ("losses_of", "fault"),
    [
        (
            lambda each: Losses(each, each),
            r"Losses.*the weights have a gradient; add the terms of a loss: Losses\(a \+ b\)",
        ),
        (lambda each: Losses(each, 2.0), "weights of shape float for"),  # type: ignore[arg-type]
        (lambda each: Losses(each, metrics={"iou": each.mean()}), "Tensor for the metric 'iou'; it must be a"),
        (lambda each: Losses(each, metrics=each), "Tensor as metrics; they must be a dict"),
    ],
)
def test_weights_with_a_gradient_and_other_metrics_are_refused(losses_of: Any, fault: str) -> None:
    def forward(model: nn.Module, micro_batch: MicroBatch) -> Losses:
        losses: Losses = losses_of(
            nn.functional.cross_entropy(model(micro_batch.inputs), micro_batch.targets, reduction="none")
        )
        return losses

    with pytest.raises(ValueError, match=f"^forward returned {fault}"):
        serve(engine_of(nn.Linear(5, 3), forward=forward), passes())


@pytest.mark.parametrize("exact", [False, True])
def test_a_norm_that_the_model_keeps_in_evaluation_stays_as_it_is(exact: bool) -> None:
    model = Net(still=True)
    norms = copy.deepcopy(model.norm.state_dict()), copy.deepcopy(model.other.state_dict())
    serve(engine_of(model, exact=exact), passes((1,) * 4))
    assert torch.equal(model.norm.running_var, norms[0]["running_var"])
    assert not torch.equal(model.other.running_var, norms[1]["running_var"])
    assert model.norm.weight is not None
    assert not torch.equal(model.norm.weight, norms[0]["weight"])  # it is trained all the same


def test_an_update_that_failed_half_way_is_forgotten_by_the_next() -> None:
    failed, clean = engine_of(Net()), engine_of(Net())
    with pytest.raises(ValueError, match=r"6 samples are 1\.50 ghost batches"):
        serve(failed, [passes()[0], passes(lacking=2)[1]])
    serve(failed, passes())
    serve(clean, passes())
    golden.assert_same_weights(failed.model, clean.model)


def test_gradients_that_were_put_away_are_put_back() -> None:
    """By `zero_grad`, which engines have no use for."""
    away, clean = engine_of(Net()), engine_of(Net())
    for _ in range(2):
        away.optimizer.zero_grad()
        serve(away, passes())
        serve(clean, passes())
    golden.assert_same_weights(away.model, clean.model)


def test_after_an_update_dropout_draws_from_torchs_generator() -> None:
    """The keys of the last micro-batch would repeat its mask, and do not fit another number of samples."""
    model = nn.Sequential(nn.Linear(5, 3), KeyedDropout(0.5))
    keyed = [replace(part, keys=sample_keys(1, np.zeros(8, np.int64), np.arange(8))) for part in passes()]
    serve(engine_of(model), keyed)
    first, second = model(torch.ones(8, 5)), model(torch.ones(8, 5))
    assert not torch.equal(first == 0, second == 0)
    assert model(torch.ones(3, 5)).shape == (3, 3)


def test_parameter_groups_keep_the_ratio_of_their_learning_rates() -> None:
    model = nn.Linear(5, 3)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.02}]
    engine = UpdateEngine(model, torch.optim.SGD(groups, lr=0.01), SingleRank())
    for lr in (0.0, 0.1, 0.3):  # as of a warm-up that starts at 0
        phase = replace(PHASE, lr=lr)
        engine.update(iter(passes()), 2, phase, NUM_GROUPS)
        assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([lr, 2 * lr])
    groups = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias]}]
    with pytest.raises(ValueError, match=r"first parameter group has lr 0, others \[0.01\]"):
        UpdateEngine(model, torch.optim.SGD(groups, lr=0.01), SingleRank())


def test_noise_as_adam_scales_it_is_refused_without_adam() -> None:
    with pytest.raises(ValueError, match=r"for torch.optim.Adam or AdamW, not SGD: omit it"):
        engine_of(nn.Linear(5, 3)).measure_noise(preconditioned=True)


def test_a_parameter_that_the_network_unfreezes_during_training_ends_the_run() -> None:
    """No optimizer has it; the weights stay as they were before the update."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    engine = UpdateEngine(model, torch.optim.SGD(model[1].parameters(), lr=0.1), SingleRank())
    serve(engine, passes())
    before = copy.deepcopy(model.state_dict())
    model[0].bias.requires_grad_(True)
    with pytest.raises(RunError, match=r"has set requires_grad = True for 0\.bias during training"):
        serve(engine, passes())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_parameter_that_is_frozen_during_training_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    engine = UpdateEngine(model, optimizer, SingleRank())
    serve(engine, passes())
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    serve(engine, passes())
    assert torch.equal(model.get_parameter("0.weight"), before["0.weight"])
    assert not torch.equal(model.get_parameter("1.weight"), before["1.weight"])
