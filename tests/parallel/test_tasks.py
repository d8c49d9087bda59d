"""Whole runs of each task: the update of one big batch, bit-identical layouts, resume, evaluation by definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.tasks.load_task import load_task
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.checkpoints.checkpoint import broadcast_checkpoint, newest_good
from hvd_batchgrow.verification.autograd_reference import PlainRun
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests.helpers import labels_of, small_job, small_source
from tests.training import Recorder, StopAfter, train

HERE = "tests.parallel.test_tasks"
pytestmark = pytest.mark.comm


class Weighted:
    """Cross-entropy in which class 0 has no weight, and the fraction of the other samples that are correct."""

    metrics = {"rare": "up"}  # noqa: RUF012  # as users write it

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        weights = targets.to(outputs.dtype)
        each = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
        right = ((outputs.argmax(1) == targets) & (targets > 0)).sum()
        return Losses(weights * each, weights, {"rare": (right, (targets > 0).sum())})


def values_of(source: Datasets, num_targets: int, *, binary: bool) -> Datasets:
    """Return a source whose targets are numbers that follow from the class."""
    table = np.random.default_rng(3).normal(2.0, 3.0, (source.num_classes, num_targets)).astype(np.float32)
    table = (table > 2.0).astype(np.float32) if binary else table
    train, test = (
        ArrayDataset(part.fetch(np.arange(len(part))), table[labels_of(part)]) for part in (source.train, source.test)
    )
    schema = {"target_mean": train.targets.mean(0).tolist(), "target_std": train.targets.std(0).tolist()}
    return replace(source, train=train, test=test, num_classes=num_targets, schema=schema)


def source_of(name: str) -> Datasets:
    source = small_source()
    if name in {"multi_label", "regression"}:
        return values_of(source, 4, binary=name == "multi_label")
    return source


TASKS: dict[str, dict[str, Any]] = {
    "classification": {"class_weights": [1.0, 3.0, 0.5]},
    "multi_label": {"pos_weights": [1.0, 2.0, 3.0, 0.5]},
    "regression": {"loss": "huber", "standardize": True},
    f"{HERE}:Weighted": {},
}
EXACT = {"exact": True, "max_micro_batch": None}


def job_of(name: str, **sections: Any) -> Job:
    data = {"source": f"{HERE}:unused", "root": None}  # the tests pass the source themselves
    schedule = {"boundaries_epochs": [0.4, 0.8], "epochs": 1.2} | sections.pop("schedule", {})
    return small_job(task={"name": name, **TASKS[name]}, data=data, schedule=schedule, **sections)


@pytest.mark.parametrize("name", TASKS)
def test_a_run_in_exact_mode_is_bit_identical_on_one_rank_and_on_all_and_after_a_stop(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    job, source = job_of(name, layout=EXACT), source_of(name)
    alone, _ = train(job, SingleRank(), tmp_path / f"alone-{ranks.rank}", source=source)
    folder = tmp_path / "together"
    stopped, ended = train(job, ranks, folder, source=source, stop=StopAfter(5, here=ranks.rank == 0))
    assert not ended.done
    assert 0 < stopped.state.samples < alone.state.samples
    checkpoint = broadcast_checkpoint(ranks, newest_good(folder / "checkpoints")[0] if ranks.rank == 0 else None)
    resumed, ended = train(job, ranks, folder, source=source, checkpoint=checkpoint)
    assert ended.done
    assert tree_digest(resumed.parts.model.state_dict()) == tree_digest(alone.parts.model.state_dict())
    assert ended.evaluation is not None
    assert alone.state.evaluation is not None
    assert ended.evaluation.metrics == pytest.approx(alone.state.evaluation.metrics, rel=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_updates_are_those_of_plain_autograd_over_the_whole_batch(ranks: Ranks, tmp_path: Path, name: str) -> None:
    job, source = job_of(name), source_of(name)
    trainer, _ = train(job, ranks, tmp_path, source=source)
    num_updates = trainer.plan.schedule.num_updates
    states = PlainRun(job, source, torch.device("cpu")).train(num_updates)
    expected, found = states[trainer.state.samples], trainer.parts.model.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", TASKS)
def test_an_evaluation_is_the_ratio_of_sums_over_the_whole_set(ranks: Ranks, tmp_path: Path, name: str) -> None:
    job, source, recorder = job_of(name, evaluation={"batch_size": 7}), source_of(name), Recorder()
    trainer, _ = train(job, ranks, tmp_path, recorder, source=source)
    evaluation = recorder.evaluations[-1]
    (part,) = trainer.parts.reader.testing([range(len(source.test))])
    with torch.no_grad():
        outputs = trainer.parts.model.eval()(part.inputs)
    losses = load_task(job.task, source.num_classes, source.schema)(outputs.double(), part.targets, training=False)
    weight = len(losses.each) if losses.weights is None else float(losses.weights.sum())
    assert evaluation.loss == pytest.approx(float(losses.each.sum()) / weight, rel=1e-5)
    expected = {key: float(total) / float(count) for key, (total, count) in losses.metrics.items()}
    assert evaluation.metrics == pytest.approx(expected, rel=1e-5)
    assert list(recorder.records[-1].metrics) == list(evaluation.metrics)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_learns(ranks: Ranks, tmp_path: Path, name: str) -> None:
    recorder = Recorder()
    job = job_of(name, schedule={"epochs": 12.0, "boundaries_epochs": [8.0]})
    train(job, ranks, tmp_path, recorder, source=source_of(name))
    assert recorder.evaluations[-1].loss < 0.8 * recorder.evaluations[0].loss


def unused(data: Any) -> Datasets:
    raise AssertionError("the tests pass the source themselves")
