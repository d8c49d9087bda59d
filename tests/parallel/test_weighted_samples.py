"""Samples with weights, such as sequences of unequal length: one mean over all tokens, in every layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.data.order.stream import ghost_batches_of_rank
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.forward import Forward, MicroBatch
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate
from tests import golden
from tests.parallel.test_noise import weighted_noise_of

GROUP, NUM_GROUPS, TOKENS, FEATURES, CLASSES = 2, 6, 7, 5, 4
BATCH = GROUP * NUM_GROUPS
LR = 0.5
LENGTHS = torch.tensor([1, 7, 2, 2, 0, 0, 6, 3, 5, 1, 4, 7])
"""Tokens of each sample, 0 in the third ghost batch."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def sequences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH, TOKENS, FEATURES, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(CLASSES, (BATCH, TOKENS), generator=generator)


def token_losses(model: nn.Module, inputs: Tensor, targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, 0 after the end of its sequence, and whether it is predicted correctly."""
    logits = model(inputs)
    is_token = torch.arange(TOKENS) < lengths[:, None]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return each * is_token, (logits.argmax(2) == targets) & is_token


def per_token(weight: float = 1.0) -> Forward:
    def forward(model: nn.Module, micro_batch: MicroBatch) -> Losses:
        lengths = micro_batch.targets[1]
        each, correct = token_losses(model, micro_batch.inputs, micro_batch.targets[0], lengths)
        metrics = {"token_accuracy": (correct.sum(), lengths.sum())}
        return Losses(weight * each.sum(1), weight * lengths.double(), metrics)

    return forward


def make_engine(ranks: Ranks, forward: Forward, *, exact: bool = False) -> UpdateEngine:
    model = network()
    return UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=LR), ranks, forward=forward, exact=exact)


def serve(engine: UpdateEngine, ranks: Ranks, per_pass: int, lengths: Tensor = LENGTHS) -> UpdateResult:
    inputs, targets = sequences()
    mine = ghost_batches_of_rank(0, NUM_GROUPS, ranks.rank, ranks.size)
    passes = [tuple(mine[first : first + per_pass]) for first in range(0, len(mine), per_pass)]

    def micro_batch(slots: Sequence[int]) -> MicroBatch:
        rows = torch.cat([torch.arange(slot * GROUP, (slot + 1) * GROUP) for slot in slots])
        return MicroBatch(inputs[rows], (targets[rows], lengths[rows]), tuple(slots))

    phase = Phase(0.0, LR, 0.0, BATCH, BATCH, start_samples=0, num_updates=1)
    return engine.update(map(micro_batch, passes), len(passes), phase, NUM_GROUPS)


@pytest.mark.parametrize("weight", [1.0, 0.1])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("per_pass", [1, 2, 6])
def test_the_gradient_is_that_of_the_mean_over_all_tokens(
    ranks: Ranks, per_pass: int, exact: bool, weight: float
) -> None:
    plain, engine = network(), make_engine(ranks, per_token(weight), exact=exact)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    for _ in range(3):
        optimizer.zero_grad()
        each, correct = token_losses(plain, *sequences(), LENGTHS)
        loss = each.sum() / LENGTHS.sum()
        loss.backward()
        optimizer.step()
        result = serve(engine, ranks, per_pass)
        # In exact mode a weight of 0.1 is rounded to a multiple of 2⁻²⁴.
        tolerance = 2.0**-24 / weight if exact and weight != 1 else 1e-12
        assert result.loss_sum / result.weight == pytest.approx(loss.item(), rel=tolerance)
        assert result.metrics["token_accuracy"] == (int(correct.sum()), int(LENGTHS.sum()))
    for ours, expected in zip(engine.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=10 * tolerance, atol=10 * tolerance)


def test_in_exact_mode_all_layouts_are_bit_identical(ranks: Ranks) -> None:
    alone, shared = (
        make_engine(SingleRank(), per_token(0.1), exact=True),
        make_engine(ranks, per_token(0.1), exact=True),
    )
    for _ in range(3):
        assert serve(shared, ranks, 1).weight == serve(alone, SingleRank(), 1).weight
    for ours, expected in zip(shared.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_clipping_uses_the_norm_of_the_weighted_mean(ranks: Ranks) -> None:
    """A weight of 3 for every sample changes no mean, so neither the norm of its gradient nor the clipped weights."""
    images, labels = golden.samples(0)
    model = golden._with_batch_norm(golden.make_model())
    logits = torch.cat([model(chunk) for chunk in images.split(golden.GROUP)])
    gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), list(model.parameters()))
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())

    def forward(model: nn.Module, micro_batch: MicroBatch) -> Losses:
        each = nn.functional.cross_entropy(model(micro_batch.inputs), micro_batch.targets, reduction="none")
        return Losses(3 * each, torch.full_like(each, 3))

    engine = golden.make_engine(ranks, rule=UpdateSection(clip_norm=norm / 2))
    engine.forward = forward
    results = [golden.serve(engine, ranks, 2, update) for update in range(golden.NUM_UPDATES)]
    assert results[0].gradient_norm == pytest.approx(norm, rel=1e-12)
    golden.assert_same_weights(engine.model, golden.reference(clip_norm=norm / 2)[0])


def expected_noise(per_pass: int, num_ranks: int) -> NoiseEstimate:
    """From the gradients of the passes of all ranks, by plain autograd."""
    model, (inputs, targets) = network(), sequences()
    sums, weights, sizes = [], [], []
    for rank in range(num_ranks):
        mine = ghost_batches_of_rank(0, NUM_GROUPS, rank, num_ranks)
        for first in range(0, len(mine), per_pass):
            rows = torch.cat([torch.arange(g * GROUP, (g + 1) * GROUP) for g in mine[first : first + per_pass]])
            each, _ = token_losses(model, inputs[rows], targets[rows], LENGTHS[rows])
            gradients = torch.autograd.grad(each.sum(), list(model.parameters()))
            sums.append(torch.cat([gradient.flatten() for gradient in gradients]))
            weights.append(float(LENGTHS[rows].sum()))
            sizes.append(len(rows))
    return weighted_noise_of(sums, weights, sizes)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("per_pass", [1, 2])
def test_the_noise_is_that_of_weighted_samples(ranks: Ranks, per_pass: int, exact: bool) -> None:
    engine = make_engine(ranks, per_token(), exact=exact)
    engine.measure_noise()
    found, expected = serve(engine, ranks, per_pass).noise["all"], expected_noise(per_pass, ranks.size)
    assert found.trace == pytest.approx(expected.trace, rel=1e-6)
    assert found.squared_norm == pytest.approx(expected.squared_norm, rel=1e-6)


def test_samples_without_any_weight_are_an_error(ranks: Ranks) -> None:
    engine = make_engine(ranks, per_token())
    before = [parameter.clone() for parameter in engine.model.parameters()]
    with pytest.raises(RunError, match="the weights of the update's 12 samples have the sum 0; it must be above 0"):
        serve(engine, ranks, 2, torch.zeros_like(LENGTHS))
    for ours, expected in zip(engine.model.parameters(), before, strict=True):
        assert torch.equal(ours, expected)


def changing_metrics() -> Forward:
    names = iter(["f1", "recall", "recall", "recall", "recall", "recall"])
    return lambda model, micro_batch: Losses(model(micro_batch.inputs).mean((1, 2)), metrics={next(names): (1.0, 1.0)})


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda: lambda model, part: Losses(model(part.inputs).mean((1, 2)), torch.ones(3)),
            r"weights of shape \(3,\) for a micro-batch of 2 samples; it must return the weight of each sample, \(2,\)",
        ),
        (changing_metrics, r"the metrics \['recall'\] for one micro-batch and \['f1'\] for another"),
    ],
)
def test_what_cannot_be_summed_is_an_error(ranks: Ranks, forward: Callable[[], Forward], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve(make_engine(ranks, forward()), ranks, 1)
