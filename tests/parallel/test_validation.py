"""Runs with a validation set: what is evaluated when, and which checkpoint is kept as the best."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.held_out import held_out_ids, with_validation
from hvd_batchgrow.train.checkpoints.best import best_path
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, newest_good
from hvd_batchgrow.train.evaluate import evaluate
from hvd_batchgrow.train.events import EvaluatedSet, Evaluation
from hvd_batchgrow.train.liveness.stop import StopRequest
from tests.helpers import NUM_TRAIN, measured_job, small_job, small_source
from tests.training import Recorder, StopAfter, digest, make_trainer, newest, train

SPLIT = {"validation_fraction": 0.1, "pipeline": "torch"}


def split_source(seed: int = 7) -> Datasets:
    return with_validation(small_source(), 0.1, seed)


def results(model: nn.Module, values: Any, labels: Any) -> tuple[float, float]:
    """Loss and accuracy, from the whole set at once."""
    images = (torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    model.eval()
    with torch.no_grad():
        logits = model(images)
    loss = nn.functional.cross_entropy(logits.double(), torch.from_numpy(labels)).item()
    return loss, (logits.argmax(1) == torch.from_numpy(labels)).double().mean().item()


def test_the_validation_set_is_evaluated_during_training_and_the_test_set_once_at_the_end(
    ranks: Ranks, tmp_path: Path
) -> None:
    job, recorder, whole = small_job(data=SPLIT, evaluation={"batch_size": 7}), Recorder(), small_source()
    trainer, ended = train(job, ranks, tmp_path, recorder, source=split_source())
    assert isinstance(whole.train, ArrayDataset)
    assert isinstance(whole.test, ArrayDataset)
    end = trainer.plan.schedule.end_samples
    assert [e.dataset for e in recorder.evaluations] == ["validation"] * 3 + ["test"]
    samples = [e.samples for e in recorder.evaluations]
    assert 270 <= samples[0] < 270 + 96  # the first update that ends at or after epoch 1 of N = 270
    assert 540 <= samples[1] < 540 + 96
    assert samples[2:] == [end, end]
    ids = held_out_ids(NUM_TRAIN, 0.1, job.seed)
    expected = results(trainer.parts.model, whole.train.values[ids], whole.train.targets[ids])
    assert (recorder.evaluations[2].loss, recorder.evaluations[2].metrics["top1"]) == pytest.approx(expected, rel=1e-5)
    expected = results(trainer.parts.model, whole.test.values, whole.test.targets)
    assert (recorder.evaluations[3].loss, recorder.evaluations[3].metrics["top1"]) == pytest.approx(expected, rel=1e-5)
    assert ended.evaluation == recorder.evaluations[3]
    again = newest(ranks, tmp_path)
    assert again is not None
    _, ended = train(job, ranks, tmp_path, source=split_source(), checkpoint=again)
    assert ended.evaluation == replace(recorder.evaluations[3], average_loss=None, average_metrics={})


def test_without_a_split_the_test_set_is_evaluated_during_training(ranks: Ranks, tmp_path: Path) -> None:
    recorder = Recorder()
    train(small_job(data={"pipeline": "torch"}), ranks, tmp_path, recorder)
    assert [e.dataset for e in recorder.evaluations] == ["test"] * 2


def test_an_evaluation_smooths_no_targets(ranks: Ranks, tmp_path: Path) -> None:
    found = []
    for smoothing in (0.0, 0.5):
        job = small_job(data={"pipeline": "torch"}, task={"name": "classification", "label_smoothing": smoothing})
        trainer = make_trainer(job, ranks, tmp_path / str(smoothing))
        found.append(evaluate(trainer.parts, trainer.state, ranks))
    assert found[0] == found[1]


def test_a_run_on_the_split_trains_as_on_a_set_that_never_had_the_held_out_samples(
    ranks: Ranks, tmp_path: Path
) -> None:
    whole = small_source()
    assert isinstance(whole.train, ArrayDataset)
    left = sorted(set(range(NUM_TRAIN)) - set(held_out_ids(NUM_TRAIN, 0.1, 7).tolist()))
    smaller = replace(whole, train=ArrayDataset(whole.train.values[left], whole.train.targets[left]))
    split, _ = train(small_job(data=SPLIT), ranks, tmp_path / "split", source=split_source())
    alone, _ = train(
        small_job(data={"pipeline": "torch", "num_samples": 270}), ranks, tmp_path / "alone", source=smaller
    )
    assert digest(split) == digest(alone)


def scripted(monkeypatch: pytest.MonkeyPatch, top1: list[float]) -> None:
    """Replace the accuracies on the validation set by these, by quarters of an epoch; the test set's is higher."""

    def fake(parts: Any, state: Any, ranks: Any, dataset: EvaluatedSet, **kwargs: Any) -> Evaluation:
        evaluation = evaluate(parts, state, ranks, dataset, **kwargs)
        if ranks.rank:
            return replace(evaluation, metrics={"top1": 1 - state.epoch / 10})  # only the results of rank 0 count
        index = min(round(state.epoch * 4) - 1, len(top1) - 1)
        return replace(evaluation, metrics={"top1": 1.0 if dataset == "test" else top1[index]})

    monkeypatch.setattr("hvd_batchgrow.train.trainer.evaluate", fake)


def best_job(**sections: Any) -> Job:
    """Updates of 16 of N = 270 samples, an evaluation every quarter of an epoch, a checkpoint every other epoch."""
    return small_job(
        data=SPLIT,
        schedule={"policy": "decay", "epochs": 1.5, "boundaries_epochs": []},
        evaluation={"every_epochs": 0.25},
        checkpoint={"every_epochs": 0.5, "keep": 1, "keep_best": "val/top1"},
        **sections,
    )


# Quarters of an epoch of 270 samples, 67.5 each, end with the updates that end at these sample counters.
ENDS = [80, 144, 208, 272, 352, 416]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("best-*"))


def test_the_checkpoint_of_the_best_evaluation_is_kept(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.2, 0.5, 0.9, 0.3, 0.9, 0.1])
    recorder = Recorder()
    _, ended = train(best_job(), ranks, tmp_path, recorder, source=split_source())
    assert [e.samples for e in recorder.evaluations] == [*ENDS, ENDS[-1]]
    if ranks.rank == 0:
        assert names(tmp_path) == ["best-000000000000208.pt"]  # the first of the two with 0.9
        newest_one, _ = newest_good(tmp_path / "checkpoints")
        assert newest_one is not None
        assert newest_one.best == {"metric": "val/top1", "value": 0.9, "samples": [80, 144, 208]}
        path = best_path(tmp_path / "checkpoints", newest_one.best)
        assert path is not None
        kept = Checkpoint.from_bytes(path.read_bytes())
        assert kept.samples == 208
        assert kept.evaluation["dataset"] == "validation"
        assert ended.best == f"best val/top1 0.9000 at sample 208: {path}"
    # Its weights are those of a run that stopped there.
    monkeypatch.undo()
    stopped, _ = train(
        best_job(), ranks, tmp_path / "stopped", source=split_source(), stop=StopAfter(13, here=ranks.rank == 0)
    )
    assert stopped.state.samples == 208
    if ranks.rank == 0:
        own = stopped.parts.model.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in kept.model.items())


@pytest.mark.parametrize("copy_at", range(1, 7))
def test_a_kill_after_any_best_leaves_the_best_of_the_whole_run(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy_at: int
) -> None:
    # What a kill leaves: the folder as it was just after an evaluation, before the next checkpoint.
    scripted(monkeypatch, [0.2, 0.5, 0.4, 0.7, 0.6, 0.3])

    class Copy(Recorder):
        def on_evaluation(self, event: Evaluation) -> None:
            super().on_evaluation(event)
            if ranks.rank == 0 and len(self.evaluations) == copy_at:
                trainer.writer.wait()
                shutil.copytree(tmp_path / "whole", tmp_path / "killed")

    trainer = make_trainer(best_job(), ranks, tmp_path / "whole", Copy(), source=split_source())
    trainer.run(StopRequest())
    checkpoint = newest(ranks, tmp_path / "killed")
    train(best_job(), ranks, tmp_path / "killed", source=split_source(), checkpoint=checkpoint)
    if ranks.rank == 0:
        for folder in ("whole", "killed"):
            assert names(tmp_path / folder) == ["best-000000000000272.pt"]
            last, _ = newest_good(tmp_path / folder / "checkpoints")
            assert last is not None
            assert last.best == {"metric": "val/top1", "value": 0.7, "samples": [80, 144, 272]}


def test_the_best_is_kept_with_its_weights_where_a_decision_restores_others(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loss never improves, so the trigger restores the weights of the first evaluation; the accuracy always does.
    seen = {}

    def fake(parts: Any, state: Any, team: Any, dataset: EvaluatedSet, **kwargs: Any) -> Evaluation:
        if dataset == "validation":
            seen[state.samples] = {name: value.clone() for name, value in parts.model.state_dict().items()}
        found = evaluate(parts, state, team, dataset, **kwargs)
        return replace(found, loss=1.0 + state.epoch, metrics={"top1": state.epoch / 10})

    monkeypatch.setattr("hvd_batchgrow.train.trainer.evaluate", fake)
    job = measured_job(
        {"name": "plateau", "patience_epochs": 0.5, "restore_best": True},
        data=SPLIT,
        schedule={"epochs": 2.0},
        evaluation={"every_epochs": 0.5},
        checkpoint={"keep_best": "val/top1"},
    )
    recorder = Recorder()
    train(job, ranks, tmp_path, recorder, source=split_source())
    restored = [decision.samples for decision in recorder.decided if decision.restore_samples is not None]
    decided = set(restored)
    assert restored
    if ranks.rank == 0:
        for name in names(tmp_path):
            kept = Checkpoint.from_bytes((tmp_path / "checkpoints" / name).read_bytes())
            assert all(torch.equal(value, seen[kept.samples][key]) for key, value in kept.model.items())
            # A checkpoint has the evaluation of its weights, not that of the weights before they were restored.
            was_restored = kept.samples in decided and not name.startswith("best")
            assert kept.evaluation.get("samples") == (None if was_restored else kept.samples)
        assert any(f"best-{samples:015d}.pt" in names(tmp_path) for samples in restored)


def test_plateau_decisions_follow_the_validation_set(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(parts: Any, state: Any, team: Any, dataset: EvaluatedSet, **kwargs: Any) -> Evaluation:
        loss = 1.0 if dataset == "validation" else 1 / (1 + state.epoch)
        return replace(evaluate(parts, state, team, dataset, **kwargs), loss=loss)

    monkeypatch.setattr("hvd_batchgrow.train.trainer.evaluate", fake)
    trigger, schedule, recorder = {"name": "plateau", "patience_epochs": 1.0}, {"epochs": 4.0}, Recorder()
    job = measured_job(trigger, data=SPLIT, schedule=schedule)
    train(job, ranks, tmp_path / "split", recorder, source=split_source())
    assert recorder.decided  # the validation loss stands still, although the test loss falls
    without = Recorder()
    job = measured_job(trigger, data={"pipeline": "torch"}, schedule=schedule)
    train(job, ranks, tmp_path / "whole", without)
    assert not without.decided


@pytest.mark.parametrize("updates", [3, 9, 14])
def test_a_run_with_a_split_that_stops_and_resumes_ends_with_the_same_weights(
    ranks: Ranks, tmp_path: Path, updates: int
) -> None:
    job = small_job(data=SPLIT, checkpoint={"keep_best": "val/loss"})
    whole, _ = train(job, ranks, tmp_path / "whole", source=split_source())
    train(job, ranks, tmp_path / "parts", source=split_source(), stop=StopAfter(updates, here=ranks.rank == 0))
    checkpoint = newest(ranks, tmp_path / "parts")
    resumed, _ = train(job, ranks, tmp_path / "parts", source=split_source(), checkpoint=checkpoint)
    assert digest(resumed) == digest(whole)
    assert resumed.state.best == whole.state.best


def test_ranks_that_wait_learn_which_evaluation_was_the_best(ranks: Ranks, tmp_path: Path) -> None:
    # The first phase needs one rank; the following ones use all.
    layout = {"grow_by": "ranks", "max_micro_batch": 16}
    job = small_job(data=SPLIT, layout=layout, checkpoint={"keep_best": "val/loss"}, evaluation={"every_epochs": 0.25})
    trainer, _ = train(job, ranks, tmp_path, source=split_source())
    assert trainer.plan.layouts[0].ranks == 1
    mine = repr(trainer.state.best).encode()
    assert ranks.broadcast_bytes(mine, "test.best") == mine
    assert trainer.state.best["samples"][0] < trainer.plan.schedule.phases[0].end_samples
