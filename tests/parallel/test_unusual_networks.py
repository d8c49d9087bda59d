"""Unusual networks, which simple gradient buckets get wrong, must train as in plain torch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.update.gradients import GradientBuckets
from hvd_batchgrow.train.weights_agree import check_agreement
from tests import golden
from tests.helpers import small_job
from tests.training import train

pytestmark = pytest.mark.comm

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}


def train_plainly(model: nn.Module, num_updates: int = golden.NUM_UPDATES) -> nn.Module:
    """Train by plain torch: mean loss of the whole batch, backward, step."""
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    for update in range(num_updates):
        images, labels = golden.samples(update)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def train_here(
    model: nn.Module, ranks: Ranks, per_pass: int, num_updates: int = golden.NUM_UPDATES, *, exact: bool = False
) -> nn.Module:
    engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), **SGD), ranks, exact=exact)
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine.buckets = GradientBuckets(parameters, ranks, bucket_bytes=512, exact=exact)  # several small buckets
    for update in range(num_updates):
        golden.serve(engine, ranks, per_pass, update)
    return model


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=torch.float64)


class Pruned(nn.Module):
    """Weights that are views with gaps: columns, rows and a transposed block of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        big = torch.randn(40, 70, 2, dtype=torch.float64) / 8
        self.columns = nn.Parameter(big[:16, :64, 0])
        self.rows = nn.Parameter(big[::3, :16, 1][:8])
        self.turned = nn.Parameter(big[30:38, 1:4, 1].t())
        self.bias = nn.Parameter(big[39, ::20, 0][:3])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x.flatten(1) @ self.columns.t())
        return torch.tanh(x @ self.rows.t()) @ self.turned.t() + self.bias


class Reused(nn.Module):
    """One layer in several reentrant checkpoints, and one both in a checkpoint and outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.often, self.both, self.last = linear(64, 8), linear(8, 8), linear(8, 8), linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for _ in range(3):
            if x.requires_grad:
                x.register_hook(lambda _: time.sleep(0.02))  # time for an all-reduce that starts too early
            x = x + checkpoint(lambda y: torch.tanh(self.both(self.often(y))), x, use_reentrant=True)
        out: Tensor = self.last(torch.tanh(self.both(x)))
        return out


class Spare(nn.Module):
    """A layer that no loss reaches, and one that only images with a bright first pixel reach."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.spare, self.some = linear(64, 3), linear(5, 5), linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        bright = x[:, 0] > 2.2  # 1 or 2 of the 96 images of an update
        out: Tensor = self.main(x)
        return torch.where(bright[:, None], out + self.some(x), out) if bright.any() else out


class ReplacesGradient(nn.Module):
    """A hook of the network replaces a gradient by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.last = linear(64, 3)
        self.last.weight.register_post_accumulate_grad_hook(replace_gradient)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x.flatten(1))
        return out


def replace_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad.clone()


NETWORKS = [Pruned, Reused, Spare, ReplacesGradient]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("per_pass", [1, 6])
@pytest.mark.parametrize("make", NETWORKS)
def test_unusual_networks_train_as_under_plain_torch(
    ranks: Ranks, make: Callable[[], nn.Module], per_pass: int, exact: bool
) -> None:
    # Not copies of one network: a copied parameter is dense and has no hooks.
    torch.manual_seed(5)
    expected = train_plainly(make())
    torch.manual_seed(5)
    model = train_here(make(), ranks, 1 if exact else per_pass, exact=exact)
    golden.assert_same_weights(model, expected)
    check_agreement(model, ranks, 0)


def test_a_layer_that_no_loss_reaches_keeps_its_weights(ranks: Ranks) -> None:
    torch.manual_seed(5)
    start = Spare()
    model = train_here(copy.deepcopy(start), ranks, 2)
    assert isinstance(model, Spare)
    assert torch.equal(model.spare.weight, start.spare.weight)
    assert not torch.equal(model.some.weight, start.some.weight)


class SometimesNested(nn.Module):
    """A layer that a reentrant checkpoint uses too, but not in the first updates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both, self.is_nested = linear(64, 3), linear(3, 3), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        if self.is_nested:
            x = checkpoint(self.both, x, use_reentrant=True)
        out: Tensor = self.both(x)
        return out


def test_a_piece_of_a_gradient_that_comes_too_late_is_an_error(ranks: Ranks) -> None:
    if ranks.size > 1:
        return  # the error ends the job
    model = SometimesNested()
    engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), **SGD), ranks)
    engine.buckets = GradientBuckets(model.parameters(), ranks, bucket_bytes=1)
    golden.serve(engine, ranks, 12, 0)
    model.is_nested = True
    with pytest.raises(RunError, match=r"shape \(3,\) was accumulated in parts, .*use_reentrant=False"):
        golden.serve(engine, ranks, 12, 1)


def test_gradients_of_16_bits_are_summed_in_float32(ranks: Ranks) -> None:
    """256 + 1 + 1 … stays 256 in bfloat16, where the next number is 258; float32 is exact."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    model.weight.data.zero_()
    engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=1.0), ranks, forward=first_output)
    size = 9 * ranks.size
    mine = range(ranks.rank, size, ranks.size)
    micro_batches = [
        MicroBatch(torch.tensor([[256.0 if place == 0 else 1.0]]), torch.zeros(1), (place,)) for place in mine
    ]
    phase = Phase(0.0, 1.0, 0.0, size, size, start_samples=0, num_updates=1)
    engine.update(iter(micro_batches), len(micro_batches), phase, size)
    expected = torch.tensor((256.0 + size - 1) / size).bfloat16()
    assert -model.weight.item() == expected.item()


def first_output(model: nn.Module, micro_batch: MicroBatch) -> Losses:
    return Losses(model(micro_batch.inputs.bfloat16()).float()[:, 0])


def test_ranks_whose_weights_differ_are_named_with_the_tensors(ranks: Ranks) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_buffer("count", torch.zeros(2))
    check_agreement(model, ranks, 64)
    culprit = ranks.size - 1
    if ranks.size == 1:
        return
    if ranks.rank == culprit:
        model.get_parameter("1.weight").data[1, 2] += 1e-6
        model.get_buffer("count")[0] = 1.0
    with pytest.raises(CollectiveError) as failure:
        check_agreement(model, ranks, 64)
    error = failure.value.error
    if ranks.rank == 0:
        assert error is not None
        message = rf"after 64 samples .* rank {culprit} differs from rank 0 in count, 1\.weight\."
        with pytest.raises(type(error), match=message):
            raise error
    else:
        assert failure.value.error is None


def test_a_run_whose_ranks_drift_apart_ends_before_its_next_checkpoint(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ranks.size == 1:
        return
    update = UpdateEngine.update

    def drift(self: UpdateEngine, *args: Any, **kwargs: Any) -> UpdateResult:
        result = update(self, *args, **kwargs)
        if ranks.rank == 1:
            next(self.model.parameters()).data.add_(1e-7)
        return result

    monkeypatch.setattr(UpdateEngine, "update", drift)
    with pytest.raises(CollectiveError) as failure:
        train(small_job(), ranks, tmp_path)
    assert failure.value.code == ExitCode.FAILURE
    assert not list((tmp_path / "checkpoints").glob("*.pt"))
