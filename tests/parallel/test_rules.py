"""What is done with a gradient before it is used: the same in every layout."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.events import Observer, TrainRecord
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.train.trainer import Trainer
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.gradients import GradientBuckets
from hvd_batchgrow.train.update.loss_scale import LossScale
from hvd_batchgrow.train.update.non_finite import NonFinite
from hvd_batchgrow.train.update.weight_average import WeightAverage
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests import golden
from tests.helpers import small_job, small_source
from tests.training import StopAfter, make_trainer, newest

pytestmark = pytest.mark.comm


def rule(**values: Any) -> UpdateSection:
    return UpdateSection(**values)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("per_pass", [1, 3])
def test_smoothed_targets_and_a_clipped_gradient_are_those_of_the_formulas(
    ranks: Ranks, per_pass: int, exact: bool
) -> None:
    expected, losses = golden.reference(smoothing=0.1, clip_norm=0.3)
    engine = golden.make_engine(ranks, exact=exact, rule=rule(clip_norm=0.3), smoothing=0.1)
    for update in range(golden.NUM_UPDATES):
        result = golden.serve(engine, ranks, per_pass, update)
        assert result.loss_sum / golden.phase().global_batch == pytest.approx(losses[update], rel=1e-12)
    golden.assert_same_weights(engine.model, expected)
    unclipped, _ = golden.reference(smoothing=0.1)
    with pytest.raises(AssertionError):
        golden.assert_same_weights(engine.model, unclipped)


# --- not finite -------------------------------------------------------------------------------------


def poison(engine: UpdateEngine, at_group: int) -> None:
    """From now on the loss of the group that contains this first sample is NaN."""
    images, _ = golden.samples(0)
    mark = images[at_group * golden.GROUP].flatten()[0]

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        return logits * torch.where((inputs[0].flatten(1)[:, 0] == mark).any(), torch.nan, 1.0)

    engine.model.register_forward_hook(hook)


@pytest.mark.parametrize("exact", [False, True])
def test_all_ranks_stop_together_and_name_the_group(ranks: Ranks, exact: bool) -> None:
    engine = golden.make_engine(ranks, exact=exact)
    poison(engine, 5)
    with pytest.raises(NonFinite, match="the loss is not finite") as fault:
        golden.serve(engine, ranks, 1, 0)
    assert fault.value.slots == (5,)


@pytest.mark.parametrize("exact", [False, True])
def test_a_skipped_update_changes_nothing(ranks: Ranks, exact: bool) -> None:
    engine, clean = (golden.make_engine(ranks, exact=exact, rule=rule(on_nonfinite="skip")) for _ in range(2))
    poison(engine, 5)
    assert golden.serve(engine, ranks, 2 - exact, 0).skipped
    assert tree_digest(engine.model.state_dict()) == tree_digest(golden.make_model().state_dict())
    for update in (1, 2):
        assert not golden.serve(engine, ranks, 2 - exact, update).skipped
        golden.serve(clean, ranks, 2 - exact, update)
    assert tree_digest(engine.model.state_dict()) == tree_digest(clean.model.state_dict())


@pytest.mark.parametrize("exact", [False, True])
def test_a_gradient_that_overflows_is_not_blamed_on_a_group(ranks: Ranks, exact: bool) -> None:
    engine = golden.make_engine(ranks, exact=exact)
    next(engine.model.parameters()).register_hook(lambda gradient: gradient + torch.inf)
    with pytest.raises(NonFinite, match="the gradient is not finite") as fault:
        golden.serve(engine, ranks, 2 - exact, 0)
    assert fault.value.slots == ()


def train(
    ranks: Ranks, folder: Path, source: Datasets | None = None, checkpoint: Checkpoint | None = None, **update: Any
) -> Trainer:
    trainer = trainer_of(ranks, folder, source=source, update=update)
    trainer.run(StopRequest(), checkpoint)
    return trainer


def trainer_of(
    ranks: Ranks, folder: Path, observers: Sequence[Observer] = (), source: Datasets | None = None, **sections: Any
) -> Trainer:
    job = small_job(checkpoint={"every_epochs": 0.5, "keep": 100}, **sections)
    return make_trainer(job, ranks, folder, *observers, source=source)


def test_a_run_that_stops_says_which_update_and_samples(ranks: Ranks, tmp_path: Path) -> None:
    source = small_source()
    with pytest.raises(CollectiveError) as failure:
        train(ranks, tmp_path, Datasets(source.train, source.test, 3, source.mean, (1e-42,)))
    if ranks.rank == 0:
        assert "update 0, samples 0 … 15, learning rate 0.05: the loss is not finite" in str(failure.value.error)
        assert "ids [" in str(failure.value.error)
    else:
        assert failure.value.error is None


def test_an_exact_sum_out_of_range_says_which_update_it_was(ranks: Ranks, tmp_path: Path) -> None:
    trainer = trainer_of(ranks, tmp_path, layout={"exact": True})
    next(trainer.parts.model.parameters()).data.mul_(1e6)  # and with it the variances of the first ghost norm
    with pytest.raises(CollectiveError) as failure:
        trainer.run(StopRequest())
    if ranks.rank == 0:
        message = (
            r"update 0, samples 0 … 15, learning rate 0.05: "
            r"a sum of absolute values is .*e\+\d+; in exact mode it must be below 262144"
        )
        assert re.search(message, str(failure.value.error))
        assert "layout.exact = false" in str(failure.value.error)


def test_an_exact_update_whose_gradients_do_not_fit_is_repeated_with_the_same_samples(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The gradients are larger than the first exponent allows, and the learning rate is smaller by the same factor."""
    trainers = []
    for name, jump in (("jumps", 2.0**40), ("even", 1.0)):
        trainer = trainer_of(
            ranks, tmp_path / name, optim={"lr": 0.05 / jump, "weight_decay": 0.0}, layout={"exact": True}
        )
        for parameter in trainer.parts.model.parameters():
            parameter.register_hook(lambda gradient, jump=jump: gradient * jump)
        assert trainer.run(StopRequest(), None).done
        trainers.append(trainer)
    jumped, even = trainers
    assert jumped.state.samples == even.state.samples
    first, second = (one.parts.engine.buckets.magnitudes[0] for one in trainers)
    assert first == pytest.approx(second + 40, abs=2)
    for name, value in even.parts.model.state_dict().items():
        torch.testing.assert_close(jumped.parts.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_resumed_exact_run_knows_the_magnitude_of_its_gradients(ranks: Ranks, tmp_path: Path) -> None:
    trainer = trainer_of(ranks, tmp_path / "whole", layout={"exact": True})
    trainer.run(StopRequest())
    magnitudes = trainer.parts.engine.buckets.magnitudes
    assert magnitudes != [0]
    resumed = trainer_of(ranks, tmp_path / "resumed", layout={"exact": True})
    resumed.state.load(trainer.state.capture())
    assert resumed.parts.engine.buckets.magnitudes == magnitudes


class Records(Observer):
    """Keeps them."""

    def __init__(self) -> None:
        self.kept: list[TrainRecord] = []

    def on_record(self, event: TrainRecord) -> None:
        self.kept.append(event)


def test_a_record_without_any_update_that_was_not_skipped_is_written(ranks: Ranks, tmp_path: Path) -> None:
    records = Records()
    trainer = trainer_of(ranks, tmp_path, [records], update={"on_nonfinite": "skip"})
    trainer.parts.model.register_forward_hook(
        lambda module, _, logits: logits * (torch.nan if module.training and trainer.state.samples >= 96 else 1.0)
    )
    trainer.run(StopRequest())
    assert trainer.state.num_skipped > 0
    assert [math.isnan(record.loss) for record in records.kept] == [record.samples > 150 for record in records.kept]
    assert (records.kept[-1].skipped, records.kept[-1].samples) == (trainer.state.num_skipped, trainer.state.samples)
    assert records.kept[-1].global_batch == 96
    # The speed counts all samples by which the counter has grown, or the times of records would be wrong.
    assert all(record.samples_per_s > 0 for record in records.kept)


def test_a_resumed_run_continues_to_count_skipped_updates(ranks: Ranks, tmp_path: Path) -> None:
    records = Records()
    stopped, resumed = (trainer_of(ranks, tmp_path, [records], update={"on_nonfinite": "skip"}) for _ in range(2))
    stopped.parts.model.register_forward_hook(
        lambda module, _, logits: logits * (torch.nan if module.training and stopped.state.samples == 16 else 1.0)
    )
    stopped.run(StopAfter(3, here=True))
    assert stopped.state.num_skipped == 1
    resumed.run(StopRequest(), newest(ranks, tmp_path))
    assert records.kept[-1].skipped == resumed.state.num_skipped == 1


# --- precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_learns_and_keeps_float32_weights(ranks: Ranks, tmp_path: Path, precision: str) -> None:
    trainer = train(ranks, tmp_path / precision, precision=precision)
    assert {parameter.dtype for parameter in trainer.parts.model.parameters()} == {torch.float32}
    reference = train(ranks, tmp_path / "float32")
    assert trainer.state.evaluation is not None
    assert reference.state.evaluation is not None
    # Twice the spacing of the type's numbers near 1: 2⁻⁷ and 2⁻¹⁰.
    spacing = torch.finfo(getattr(torch, precision)).eps
    assert trainer.state.evaluation.loss == pytest.approx(reference.state.evaluation.loss, rel=2 * spacing)
    assert trainer.state.evaluation.loss != reference.state.evaluation.loss


def test_a_loss_scale_changes_no_bit_of_a_gradient_that_fits(ranks: Ranks) -> None:
    plain, scaled = golden.make_engine(ranks), golden.make_engine(ranks)
    scaled.loss_scale = LossScale()
    for update in range(golden.NUM_UPDATES):
        golden.serve(plain, ranks, 2, update)
        golden.serve(scaled, ranks, 2, update)
    assert tree_digest(plain.model.state_dict()) == tree_digest(scaled.model.state_dict())


def test_an_overflow_halves_the_scale_on_all_ranks_and_leaves_the_update_out(ranks: Ranks) -> None:
    engine = golden.make_engine(ranks)
    engine.loss_scale = LossScale(value=8.0)
    limit = engine.loss_scale.value / 2

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        assert engine.loss_scale is not None
        return gradient * (torch.inf if engine.loss_scale.value > limit else 1.0)

    next(engine.model.parameters()).register_hook(overflow)
    assert golden.serve(engine, ranks, 2, 0).skipped
    assert engine.loss_scale.value == 4.0
    assert not golden.serve(engine, ranks, 2, 1).skipped
    assert (engine.loss_scale.value, engine.loss_scale.good_updates) == (4.0, 1)


def test_growth_of_the_batch_loses_as_few_updates_as_torchs_scaler() -> None:
    """10,000 updates of 65,536 samples, in which gradients overflow above a ceiling that falls once."""
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    skipped, expected = 0, 0
    for update in range(10_000):
        ceiling = 2.0**18 if update < 5_000 else 2.0**14
        before = theirs.get_scale() if update else 2.0**16
        theirs.scale(torch.zeros(1))  # creates the scale
        parameter.grad = torch.full((1,), torch.inf if before > ceiling else 0.0)
        theirs.step(optimizer)
        theirs.update()
        expected += theirs.get_scale() < before
        assert ours.value == before
        skipped += ours.after(overflow=ours.value > ceiling)
    assert skipped == expected
    assert skipped == 6  # four halvings when the ceiling falls, then one doubling too many per 2,000 updates


def test_the_factor_is_a_power_of_two_per_sample() -> None:
    assert LossScale().per_sample(64) == 2.0**10
    assert LossScale().per_sample(96) == 2.0**10


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_gradient_that_overflows_without_a_scale_follows_the_rule(ranks: Ranks, on_nonfinite: str) -> None:
    engine = golden.make_engine(ranks, rule=rule(on_nonfinite=on_nonfinite))
    engine.loss_scale = LossScale(value=2.0)
    next(engine.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    assert golden.serve(engine, ranks, 2, 0).skipped
    assert engine.loss_scale.value == 1.0
    if on_nonfinite == "skip":
        assert golden.serve(engine, ranks, 2, 1).skipped
        assert engine.loss_scale.value == 1.0
    else:
        with pytest.raises(NonFinite, match="the gradient is not finite"):
            golden.serve(engine, ranks, 2, 1)


# --- compression ----------------------------------------------------------------------------------------


def test_half_the_bytes_cross_the_network_and_one_rank_rounds_nothing(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compressed = golden.make_engine(ranks), golden.make_engine(ranks, rule=rule(allreduce_dtype="float16"))
    sent: dict[str, torch.dtype] = {}
    start_all_reduce = ranks.start_all_reduce
    monkeypatch.setattr(
        ranks,
        "start_all_reduce",
        lambda tensor, name: (sent.update({name: tensor.dtype}), start_all_reduce(tensor, name))[1],
    )
    golden.serve(compressed, ranks, 2, 0)
    on_network = torch.float16 if ranks.size > 1 else torch.float64
    assert sent == {"totals": torch.float64, "gradients.0": on_network, "reached": torch.int64}
    golden.serve(plain, ranks, 2, 0)
    ours, theirs = ([p.detach() for p in engine.model.parameters()] for engine in (compressed, plain))
    # One update from the same weights: what differs is the gradient, by no more than float16 rounds it.
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert 1e-9 < worst < 2.0**-10 if ranks.size > 1 else worst == 0


def test_a_gradient_too_large_for_float16_is_not_finite_on_all_ranks(ranks: Ranks) -> None:
    engine = golden.make_engine(ranks, rule=rule(allreduce_dtype="float16", on_nonfinite="skip"))
    # The sum over 96 samples would not fit, a hundredth of it does; a mean of 65 · 2¹⁰ does not.
    for factor, fits in ((1000.0, True), (1e6, False)):
        handle = next(engine.model.parameters()).register_hook(lambda gradient, factor=factor: gradient * factor)
        assert golden.serve(engine, ranks, 2, 0).skipped == (ranks.size > 1 and not fits)
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_that_cannot_be_added_are_refused(ranks: Ranks, dtype: torch.dtype) -> None:
    model = golden.make_model()
    if ranks.size == 1 or dtype in ranks.sum_types:
        GradientBuckets(model.parameters(), ranks, wire_type=dtype)
    else:
        with pytest.raises(ValueError, match=f"{ranks.backend} cannot sum bfloat16; allowed: float16"):
            GradientBuckets(model.parameters(), ranks, wire_type=dtype)


# --- averaged weights -----------------------------------------------------------------------------------


def test_the_average_forgets_by_samples_whatever_the_batch() -> None:
    model = torch.nn.Linear(1, 1, bias=False).double()
    averages = [WeightAverage(model, 100.0) for _ in range(2)]
    for average in averages:
        model.weight.data.fill_(1.0)
        average.update(32)
    model.weight.data.fill_(3.0)
    averages[0].update(64)
    averages[1].update(32)
    averages[1].update(32)
    expected = 3.0 + (1.0 - 3.0) * torch.tensor(-0.64, dtype=torch.float64).exp()
    for average in averages:
        with average.in_place():
            assert model.weight.item() == pytest.approx(expected.item(), rel=1e-12)
        assert model.weight.item() == 3.0


def test_a_skipped_update_does_not_change_the_average(ranks: Ranks, tmp_path: Path) -> None:
    """The weights 1, 3 and 2, and between the last two an update that is skipped."""
    with_skip = [(1.0, False), (3.0, False), (3.0, True), (2.0, False)]
    found = []
    for name, updates in (("skip", with_skip), ("plain", [one for one in with_skip if not one[1]])):
        trainer = trainer_of(ranks, tmp_path / name, update={"ema_samples": 100.0, "on_nonfinite": "skip"})
        state = trainer.state
        assert state.average is not None
        averages = []
        for weight, is_skipped in updates:
            for parameter in trainer.parts.model.parameters():
                parameter.data.fill_(weight)
            state.add(UpdateResult(16.0, 16.0, {}, False, 0, (), is_skipped, 1.0, {}), 16)
            averages.append(tree_digest(state.average.state_dict()))
        found.append(averages)
    first, second, last = found[1]
    assert found[0] == [first, second, second, last]


def test_a_resumed_run_has_the_average_and_the_scale_of_an_undisturbed_one(ranks: Ranks, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ema_samples": 150.0, "precision": "float16"}
    whole = train(ranks, tmp_path / "whole", **settings)
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").glob("*.pt")) if ranks.rank == 0 else []
    data = ranks.broadcast_bytes(checkpoints[1].read_bytes() if checkpoints else b"", "test")
    resumed = train(ranks, tmp_path / "resumed", checkpoint=Checkpoint.from_bytes(data), **settings)
    assert whole.state.average is not None
    assert resumed.state.average is not None
    assert tree_digest(resumed.state.average.state_dict()) == tree_digest(whole.state.average.state_dict())
    assert resumed.parts.engine.loss_scale == whole.parts.engine.loss_scale
    assert resumed.state.evaluation == whole.state.evaluation
    assert whole.state.evaluation is not None
    assert whole.state.evaluation.average_loss not in (None, whole.state.evaluation.loss)
