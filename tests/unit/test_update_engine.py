"""What an engine does with a model, an optimiser and passes that are not quite as they should be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.nn.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.forward import Losses, MicroBatch
from tests import golden

GROUP, NUM_GROUPS = 4, 4
PHASE = Phase(0.0, 0, 10, 0.1, 0.9, GROUP * NUM_GROUPS, GROUP * NUM_GROUPS)


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
        positions = tuple(range(first, first + size))
        made.append(MicroBatch(torch.randn(count, 5, generator=generator), labels, positions))
        first += size
    return made


def serve(engine: UpdateEngine, micro_batches: list[MicroBatch]) -> UpdateResult:
    return engine.update(iter(micro_batches), len(micro_batches), PHASE, NUM_GROUPS)


def test_a_pass_that_has_not_the_samples_of_its_groups_is_refused() -> None:
    """Their sum would be divided by a batch that it is not of."""
    for micro_batches in (passes(lacking=2), passes(lacking=GROUP)):
        with pytest.raises(
            ValueError, match=r"micro-batch of 2 groups of 4; it must give the loss of each sample, \(8,\)"
        ):
            serve(engine_of(nn.Linear(5, 3)), micro_batches)
    nowhere = [MicroBatch(part.inputs, part.labels, ()) for part in passes()]
    with pytest.raises(ValueError, match="micro-batch of 0 groups"):
        serve(engine_of(nn.Linear(5, 3)), nowhere)


def test_a_mean_in_the_place_of_losses_is_refused() -> None:
    def forward(model: nn.Module, micro_batch: MicroBatch) -> Losses:
        return Losses(nn.functional.cross_entropy(model(micro_batch.inputs), micro_batch.labels))

    with pytest.raises(ValueError, match=r"losses of shape \(\) for .*reduction='none'"):
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
