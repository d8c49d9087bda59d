"""The noise in the gradient of an update, measured in any layout, against each pass's gradient worked out alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.data.order.stream import ghost_batches_of_rank
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import Forward, MicroBatch
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate
from hvd_batchgrow.train.update.gradient_norms import ALL
from hvd_batchgrow.train.update.gradients import GradientBuckets
from hvd_batchgrow.train.update.loss_scale import LossScale
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests import golden
from tests.helpers import small_job
from tests.parallel.test_rules import poison


def make_engine(
    ranks: Ranks, *, exact: bool = False, single: bool = False, adam: bool = False, **rule: Any
) -> UpdateEngine:
    """The golden engine with several buckets, of which one has a parameter that no loss reaches."""
    engine = golden.make_engine(ranks, exact=exact, rule=UpdateSection(**rule))
    if single:
        engine.model.float()
    if adam:
        optim = small_job(optim={"name": "adam", "lr": 1e-3, "weight_decay": 0.0}).optim
        engine.optimizer = build_optimizer(engine.model, optim)
    dtype = next(engine.model.parameters()).dtype
    unused = [] if adam else [nn.Parameter(torch.ones(7, dtype=dtype))]
    engine.buckets = GradientBuckets([*unused, *engine.model.parameters()], ranks, bucket_bytes=512, exact=exact)
    return engine


def gradients(
    model: Any, ranks: Ranks, per_pass: int, update: int, num_ghost_batches: int
) -> tuple[list[Tensor], list[int]]:
    """Mean gradient of every pass of every rank, flat, in float64; and of how many samples each is."""
    plain = golden._with_batch_norm(model)
    plain.load_state_dict(model.state_dict(), strict=False)
    images, labels = golden.samples(update)
    found, sizes = [], []
    for rank in range(ranks.size):
        mine = ghost_batches_of_rank(0, num_ghost_batches, rank, ranks.size)
        for first in range(0, len(mine), per_pass):
            loss, count = torch.zeros((), dtype=torch.float64), 0
            for group in mine[first : first + per_pass]:
                part = slice(group * golden.GROUP, (group + 1) * golden.GROUP)
                loss = loss + nn.functional.cross_entropy(plain(images[part]), labels[part], reduction="sum")
                count += golden.GROUP
            each = torch.autograd.grad(loss / count, list(plain.parameters()))
            found.append(torch.cat([gradient.flatten() for gradient in each]))
            sizes.append(count)
    return found, sizes


def noise_of(passes: list[Tensor], sizes: list[int]) -> NoiseEstimate:
    """Σ bᵢ |gᵢ - g|² / (k - 1), and |g|² less its share of it."""
    each: NDArray[np.float64] = torch.stack(passes).numpy()
    mean = np.average(each, axis=0, weights=sizes)
    trace = float((np.array(sizes) * ((each - mean) ** 2).sum(1)).sum()) / (len(sizes) - 1)
    return NoiseEstimate(trace, float(mean @ mean) - trace / sum(sizes))


def weighted_noise_of(sums: Sequence[Tensor], weights: Sequence[float], sizes: Sequence[int]) -> NoiseEstimate:
    """The formula of docs/triggers.md for sums of weighted gradients; each sum has a total weight and a size."""
    w, b, total, batch = np.array(weights), np.array(sizes), sum(weights), sum(sizes)
    g = torch.stack([*sums]).sum(0).numpy() / total
    squares = (batch / total) ** 2 * float((np.array([float(each @ each) for each in sums]) / b).sum())
    c = batch / total**2 * float((w**2 / b).sum())
    trace = (squares - c * batch * float(g @ g)) / (len(sums) - c)
    return NoiseEstimate(trace, float(g @ g) - trace / batch)


def assert_close(seen: NoiseEstimate, wanted: NoiseEstimate, rel: float = 1e-9) -> None:
    assert seen.trace == pytest.approx(wanted.trace, rel=rel)
    assert seen.squared_norm == pytest.approx(wanted.squared_norm, rel=rel, abs=rel * wanted.trace)


def weigh(engine: UpdateEngine) -> None:
    """Give each sample a weight that its label decides, as class weights do."""
    plain = engine.forward

    def forward(model: nn.Module, part: MicroBatch) -> Losses:
        losses = plain(model, part)
        weights = 1 / (1.0 + part.targets.to(losses.each.dtype))
        return replace(losses, each=losses.each * weights, weights=weights)

    engine.forward = forward


# --- against each pass alone ------------------------------------------------------------------------


@pytest.mark.parametrize("num_ghost_batches", [12, 11])
@pytest.mark.parametrize("per_pass", [1, 2, 3])
def test_norms_are_those_of_each_pass_on_each_rank_before_anything_is_summed(
    ranks: Ranks, per_pass: int, num_ghost_batches: int
) -> None:
    # (g): not of sums over ranks, nor over the passes before
    engine = make_engine(ranks)
    engine.measure_noise()
    for update in range(golden.NUM_UPDATES):
        wanted = noise_of(*gradients(engine.model, ranks, per_pass, update, num_ghost_batches))
        result = golden.serve(engine, ranks, per_pass, update, num_ghost_batches)
        assert result.noise.keys() == {ALL}
        assert_close(result.noise[ALL], wanted)


def test_one_pass_on_each_rank_is_measured_where_there_are_ranks(ranks: Ranks) -> None:
    engine = make_engine(ranks)
    engine.measure_noise()
    result = golden.serve(engine, ranks, golden.NUM_GROUPS // ranks.size, 0)
    if ranks.size == 1:
        assert result.noise == {}
    else:
        model = golden.make_model()
        assert_close(result.noise[ALL], noise_of(*gradients(model, ranks, 12 // ranks.size, 0, 12)))


def test_exact_norms_are_those_of_each_group(ranks: Ranks) -> None:
    engine = make_engine(ranks, exact=True)
    engine.measure_noise()
    wanted = noise_of(*gradients(engine.model, ranks, 1, 0, 11))
    assert_close(golden.serve(engine, ranks, 1, 0, 11).noise[ALL], wanted)


def test_exact_norms_of_small_gradients_lose_no_digit(ranks: Ranks) -> None:
    """2⁻³⁰ times the loss is 2⁻⁶⁰ times the noise."""
    traces = []
    for factor in (1.0, 2.0**-30):
        engine = make_engine(ranks, exact=True)
        engine.measure_noise()
        plain = engine.forward

        def forward(model: nn.Module, part: MicroBatch, plain: Forward = plain, factor: float = factor) -> Losses:
            losses = plain(model, part)
            return replace(losses, each=losses.each * factor)

        engine.forward = forward
        traces.append(golden.serve(engine, ranks, 1, 0).noise[ALL].trace)
    assert traces[1] * 2.0**60 == pytest.approx(traces[0], rel=1e-6)


def test_norms_are_taken_before_clipping(ranks: Ranks) -> None:
    engine = make_engine(ranks, clip_norm=1e-3)
    engine.measure_noise()
    wanted = noise_of(*gradients(engine.model, ranks, 2, 0, 12))
    assert_close(golden.serve(engine, ranks, 2, 0).noise[ALL], wanted)


def test_the_loss_scale_is_divided_out(ranks: Ranks) -> None:
    engine = make_engine(ranks)
    engine.loss_scale = LossScale(value=4096.0)
    engine.measure_noise()
    wanted = noise_of(*gradients(engine.model, ranks, 2, 0, 12))
    assert_close(golden.serve(engine, ranks, 2, 0).noise[ALL], wanted)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_measures_about_the_same(ranks: Ranks, precision: str) -> None:
    engine = make_engine(ranks, single=True, precision=precision)
    if engine.loss_scale:
        engine.loss_scale = LossScale(value=2.0**8)
    engine.measure_noise()
    wanted = noise_of(*gradients(golden.make_model(), ranks, 2, 0, 12))
    seen = golden.serve(engine, ranks, 2, 0).noise[ALL]
    assert_close(seen, wanted, rel=0.05)


def test_layer_groups_are_the_children_of_the_network(ranks: Ranks) -> None:
    engine = golden.make_engine(ranks)
    engine.measure_noise(per_layer_group=True)
    passes, sizes = gradients(engine.model, ranks, 2, 0, 12)
    found = golden.serve(engine, ranks, 2, 0).noise
    names = [name.partition(".")[0] for name, p in engine.model.named_parameters() for _ in range(p.numel())]
    assert found.keys() == {ALL, *names}
    for name, seen in found.items():
        mine = [k for k, one in enumerate(names) if name in (ALL, one)]
        assert_close(seen, noise_of([one[mine] for one in passes], sizes))


def test_preconditioned_norms_are_of_the_gradient_as_adam_scales_it(ranks: Ranks) -> None:
    engine = make_engine(ranks, adam=True)
    engine.measure_noise(preconditioned=True)
    for update in range(golden.NUM_UPDATES):
        scales = []
        for parameter in engine.model.parameters():
            state = engine.optimizer.state.get(parameter, {})
            second = state["exp_avg_sq"] / (1 - 0.999**update) if state else torch.ones_like(parameter)
            scales.append((1 / (second.sqrt() + 1e-8) if state else second).detach().flatten())
        scale = torch.cat(scales)
        passes, sizes = gradients(engine.model, ranks, 2, update, 12)
        wanted = noise_of([one * scale for one in passes], sizes)
        assert_close(golden.serve(engine, ranks, 2, update).noise[ALL], wanted, rel=1e-6)


def test_a_skipped_update_contributes_nothing(ranks: Ranks) -> None:
    engine = make_engine(ranks, on_nonfinite="skip")
    engine.measure_noise()
    poison(engine, 5)
    assert golden.serve(engine, ranks, 2, 0).noise == {}
    wanted = noise_of(*gradients(engine.model, ranks, 2, 1, 12))
    assert_close(golden.serve(engine, ranks, 2, 1).noise[ALL], wanted)


# --- what measuring leaves alone --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_pass", "settings"),
    [
        (12, {}),
        (3, {}),
        (2, {"clip_norm": 0.3}),
        (1, {}),
        (1, {"exact": True}),
        (2, {"precision": "bfloat16"}),
        (3, {"allreduce_dtype": "float16"}),
        (2, {"adam": True}),
    ],
)
def test_measuring_changes_no_bit_of_the_weights(ranks: Ranks, per_pass: int, settings: dict[str, Any]) -> None:
    plain, measuring = (make_engine(ranks, single=True, **settings) for _ in range(2))
    measuring.measure_noise(per_layer_group=False, preconditioned="adam" in settings)
    for update in range(golden.NUM_UPDATES):
        results = [golden.serve(engine, ranks, per_pass, update, 11) for engine in (plain, measuring)]
        assert results[0].loss_sum == results[1].loss_sum
        assert results[0].noise == {}
        assert bool(results[1].noise) == (ranks.size > 1 or per_pass < 11)
    trees = [{"m": engine.model.state_dict(), "o": engine.optimizer.state_dict()} for engine in (plain, measuring)]
    assert tree_digest(trees[0]) == tree_digest(trees[1])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_ghost_batches", [12, 11])
def test_exact_measurements_are_those_of_one_rank_to_the_bit(
    ranks: Ranks, num_ghost_batches: int, weighted: bool
) -> None:
    """Against the groups of all ranks served in one process, in another order."""
    alone = make_engine(SingleRank(), exact=True, single=True)
    together = make_engine(ranks, exact=True, single=True)
    for engine in (alone, together):
        engine.measure_noise(per_layer_group=False)
        if weighted:
            weigh(engine)
    for update in range(golden.NUM_UPDATES):
        first = golden.serve(alone, alone.ranks, 1, update, num_ghost_batches, order=-1)
        second = golden.serve(together, ranks, 1, update, num_ghost_batches)
        assert first.noise == second.noise
        assert first.loss_sum == second.loss_sum
    assert tree_digest(together.model.state_dict()) == tree_digest(alone.model.state_dict())
