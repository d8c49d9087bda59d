"""The noise of norm layers, measured in any layout, against plain autograd's gradients of single units."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, GhostBatchNorm2d
from hvd_batchgrow.nn.norm_gradients import NormGradients
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.tasks.classification import Classification
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import Forward, MicroBatch, forward_of
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate
from hvd_batchgrow.train.update.gradient_norms import ALL, NORM_LAYERS
from hvd_batchgrow.train.update.loss_scale import LossScale
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests import golden
from tests.helpers import small_job
from tests.parallel.test_measured import NOISE, assert_same, job_of, newest, train
from tests.parallel.test_noise import assert_close, noise_of, weighted_noise_of
from tests.training import Recorder, StopAfter

GROUP = golden.GROUP


class Shared(nn.Module):
    """A layer norm that is used twice, on the tokens of a sample, and a root-mean-square norm without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm, self.last, self.plain = nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, elementwise_affine=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.first(images.squeeze(1)))  # the rows of an image are its tokens
        tokens = self.norm(self.second(nn.functional.relu_(tokens)))
        return self.head(self.last(self.plain(tokens.tanh())).mean(1))  # type: ignore[no-any-return]


def group_norms() -> nn.Module:
    convolutions = [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3)]
    return nn.Sequential(*convolutions, nn.GroupNorm(3, 6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


def ghost_and_layer_norms() -> nn.Module:
    ghost = GhostBatchNorm2d(4, GROUP)
    return nn.Sequential(nn.Conv2d(1, 4, 3), ghost, nn.ReLU(), nn.LayerNorm((4, 6, 6)), nn.Flatten(), nn.LazyLinear(3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ghost norms": golden.make_model,
    "group norms": group_norms,
    "ghost and layer norms": ghost_and_layer_norms,
    "a norm used twice": Shared,
}
SAMPLE_UNITS = {"group norms", "a norm used twice"}


def network(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = NETWORKS[name]().double()
    model(torch.zeros(GROUP, 1, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def engine_of(
    model: nn.Module, ranks: Ranks, *, exact: bool = False, forward: Forward | None = None, **rule: object
) -> UpdateEngine:
    section = UpdateSection(**rule)  # type: ignore[arg-type]
    optim = small_job(optim={"lr": golden.LR, "momentum": golden.MOMENTUM}).optim
    forward = forward or forward_of(Classification(), section.precision)
    return UpdateEngine(model, build_optimizer(model, optim), ranks, exact=exact, rule=section, forward=forward)


def measuring(name: str, ranks: Ranks, **settings: object) -> UpdateEngine:
    engine = engine_of(network(name), ranks, **settings)  # type: ignore[arg-type]
    engine.measure_noise(layers=NormGradients(engine.model))
    return engine


def plain_copy(model: nn.Module) -> nn.Module:
    """Return the network with torch's batch norms, which normalize one ghost batch at a time."""
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, child in parent.named_children():
            if isinstance(child, GhostBatchNorm):
                norm = nn.BatchNorm2d(child.num_features).to(child.running_mean.dtype)
                norm.weight, norm.bias = child.weight, child.bias  # type: ignore[assignment]
                setattr(parent, name, norm)
    return plain


def of_units(
    model: nn.Module, unit: int, update: int, num_ghost_batches: int, weights: Sequence[float] = ()
) -> NoiseEstimate:
    """The estimate from the gradients of the norms' parameters, one autograd call for each unit of `unit` samples."""
    plain = plain_copy(model).double().train()
    kinds = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    wanted = [p for module in plain.modules() if isinstance(module, kinds) for p in module.parameters()]
    images, labels = golden.samples(update)
    each = torch.tensor(weights).double() if weights else torch.ones(len(images), dtype=torch.float64)
    sums, totals = [], []
    for first in range(0, num_ghost_batches * GROUP, unit):
        rows = slice(first, first + unit)
        losses = nn.functional.cross_entropy(plain(images[rows]), labels[rows], reduction="none") * each[rows]
        gradients = torch.autograd.grad(losses.sum(), wanted)
        sums.append(torch.cat([gradient.flatten() for gradient in gradients]))
        totals.append(float(each[rows].sum()))
    sizes = [unit] * len(sums)
    return weighted_noise_of(sums, totals, sizes) if weights else noise_of([s / unit for s in sums], sizes)


def unit_of(name: str) -> int:
    return 1 if name in SAMPLE_UNITS else GROUP


# --- against plain autograd -------------------------------------------------------------------------


@pytest.mark.parametrize("num_ghost_batches", [12, 11])
@pytest.mark.parametrize("per_pass", [1, 3, 12])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_estimate_is_that_of_single_units(ranks: Ranks, name: str, per_pass: int, num_ghost_batches: int) -> None:
    engine = measuring(name, ranks)
    for update in range(2):
        wanted = of_units(engine.model, unit_of(name), update, num_ghost_batches)
        result = golden.serve(engine, ranks, per_pass, update, num_ghost_batches)
        assert_close(result.noise[NORM_LAYERS], wanted)
        assert result.noise[NORM_LAYERS].num_gradients == num_ghost_batches * GROUP // unit_of(name)
        assert (ALL in result.noise) == (ranks.size > 1 or per_pass < num_ghost_batches)


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_estimates_are_those_of_single_units_too(ranks: Ranks, name: str) -> None:
    engine = measuring(name, ranks, exact=True)
    wanted = of_units(engine.model, unit_of(name), 0, 11)
    assert_close(golden.serve(engine, ranks, 1, 0, 11).noise[NORM_LAYERS], wanted)


def test_mixed_samples_make_the_ghost_batch_the_unit(ranks: Ranks) -> None:
    engine = engine_of(network("group norms"), ranks)
    engine.measure_noise(layers=NormGradients(engine.model, mixes_samples=True))
    wanted = of_units(engine.model, GROUP, 0, 12)
    assert_close(golden.serve(engine, ranks, 3, 0).noise[NORM_LAYERS], wanted)


@pytest.mark.parametrize("name", ["ghost norms", "group norms"])
def test_float32_and_the_kernels_of_this_package_give_about_the_same(ranks: Ranks, name: str) -> None:
    engine = engine_of(network(name).float(), ranks)
    engine.measure_noise(layers=NormGradients(engine.model))
    wanted = of_units(engine.model, unit_of(name), 0, 12)
    assert_close(golden.serve(engine, ranks, 6, 0).noise[NORM_LAYERS], wanted, rel=1e-4)


def test_it_is_measured_before_clipping_and_without_the_loss_scale(ranks: Ranks) -> None:
    engine = measuring("ghost norms", ranks, clip_norm=1e-3)
    engine.loss_scale = LossScale(value=4096.0)
    wanted = of_units(engine.model, GROUP, 0, 12)
    assert_close(golden.serve(engine, ranks, 4, 0).noise[NORM_LAYERS], wanted)


@pytest.mark.parametrize("name", ["ghost norms", "group norms"])
def test_units_have_the_weights_of_their_samples(ranks: Ranks, name: str) -> None:
    weights = np.random.default_rng(0).integers(0, 4, 12 * GROUP).astype(float)
    weights[2 * GROUP : 3 * GROUP] = 0  # a ghost batch of no weight

    def weighted(model: nn.Module, micro_batch: MicroBatch) -> Losses:
        rows = np.concatenate([np.arange(slot * GROUP, (slot + 1) * GROUP) for slot in micro_batch.slots])
        each = torch.tensor(weights[rows])
        losses = nn.functional.cross_entropy(model(micro_batch.inputs), micro_batch.targets, reduction="none")
        return Losses(losses * each, each)

    engine = measuring(name, ranks, forward=weighted)
    wanted = of_units(engine.model, unit_of(name), 0, 12, weights.tolist())
    assert_close(golden.serve(engine, ranks, 4, 0).noise[NORM_LAYERS], wanted)


def test_frozen_parameters_do_not_count(ranks: Ranks) -> None:
    model = network("group norms")
    model.get_parameter("1.bias").requires_grad_(False)
    model.get_submodule("4").requires_grad_(False)
    engine = engine_of(model, ranks)
    engine.measure_noise(layers=NormGradients(model))
    result = golden.serve(engine, ranks, 4, 0)
    images, labels = golden.samples(0)
    weight = copy.deepcopy(network("group norms"))
    losses = nn.functional.cross_entropy(weight(images), labels, reduction="none")
    rows = [torch.autograd.grad(loss, weight.get_parameter("1.weight"), retain_graph=True)[0] for loss in losses]
    assert_close(result.noise[NORM_LAYERS], noise_of(rows, [1] * len(rows)))


# --- what measuring leaves alone --------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("per_pass", "exact"), [(12, False), (3, False), (1, False), (1, True)])
def test_measuring_changes_no_bit_of_the_weights(ranks: Ranks, name: str, per_pass: int, exact: bool) -> None:
    engines = [engine_of(network(name).float(), ranks, exact=exact) for _ in range(2)]
    engines[1].measure_noise(layers=NormGradients(engines[1].model))
    for update in range(golden.NUM_UPDATES):
        results = [golden.serve(engine, ranks, per_pass, update, 11) for engine in engines]
        assert results[0].loss_sum == results[1].loss_sum
        assert NORM_LAYERS in results[1].noise
    trees = [{"m": engine.model.state_dict(), "o": engine.optimizer.state_dict()} for engine in engines]
    assert tree_digest(trees[0]) == tree_digest(trees[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_measurements_are_those_of_one_rank_to_the_bit(ranks: Ranks, name: str) -> None:
    """Against the groups of all ranks served in one process, in another order."""
    engines = []
    for own in (SingleRank(), ranks):
        engines.append(engine_of(network(name).float(), own, exact=True))
        engines[-1].measure_noise(layers=NormGradients(engines[-1].model))
    alone, together = engines
    for update in range(golden.NUM_UPDATES):
        first = golden.serve(alone, alone.ranks, 1, update, 11, order=-1)
        second = golden.serve(together, ranks, 1, update, 11)
        assert first.noise == second.noise
        assert first.gradient_norm == second.gradient_norm


# --- a run that grows by it -------------------------------------------------------------------------


def test_a_run_of_one_micro_batch_grows_and_resumes_with_the_same_averages(ranks: Ranks, tmp_path: Path) -> None:
    sections = {"gradient_noise": {"estimator": "norm_layers"}, "layout": {"max_micro_batch": 96}}
    job, recorder = job_of({**NOISE, "ratio": 0.001}, **sections), Recorder()
    whole = train(job, ranks, tmp_path / "whole", recorder)
    decisions = whole.state.growth.decisions
    assert [decision.new_batch for decision in decisions] == [32, 64, 96]
    assert all(decision.measured["estimator"] == "norm_layers" for decision in decisions)
    if ranks.rank == 0:
        layers = [record.norm_layers for record in recorder.records]
        assert all(
            found is not None and found.num_units == record.global_batch // 8
            for found, record in zip(layers, recorder.records, strict=True)
        )
        assert all((found is not None and found.micro_batches is not None) == (ranks.size > 1) for found in layers)
        scales = [record.gradient_noise[ALL] for record in recorder.records]
        own = [(found.factor, found.b_simple) for found in layers if found is not None]
        for scale, (factor, b_simple) in zip(scales, own, strict=True):
            assert scale.b_simple == (None if b_simple is None else pytest.approx(factor * b_simple))
    train(job, ranks, tmp_path / "parts", stop=StopAfter(14, here=True))
    parts = train(job, ranks, tmp_path / "parts", checkpoint=newest(ranks, tmp_path / "parts"))
    assert_same(ranks, whole, parts)
    assert whole.state.growth.state()["noise"] == parts.state.growth.state()["noise"]
