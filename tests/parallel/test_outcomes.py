"""The outcome of each test sample at the end of a run: that of the network, for any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.observers.outcomes import OutcomesFile
from hvd_batchgrow.results.outcomes import read_outcomes
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.evaluate import evaluate
from hvd_batchgrow.train.events import Evaluation
from hvd_batchgrow.train.trainer import Trainer
from tests.helpers import NUM_TEST, encoded_samples, labels_of, small_job, small_source
from tests.training import Recorder, train

pytestmark = pytest.mark.comm
HERE = "tests.parallel.test_outcomes"
LABELS = torch.tensor(labels_of(small_source().test))


class Half:
    """Cross-entropy with a weight of 1/2 per sample, without `correct`."""

    metrics = {"mean": "down"}  # noqa: RUF012  # as users write it

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        each = functional.cross_entropy(outputs, targets, reduction="none") / 2
        return Losses(each, torch.full_like(each, 0.5), {"mean": (each.detach().sum(), len(each))})


def without_outcomes(*args: Any, with_outcomes: bool) -> Evaluation:
    """Evaluate without collecting outcomes."""
    return evaluate(*args)


def logits(trainer: Trainer) -> Tensor:
    """The outputs of a trained network for all test samples, from their pixels and the definition of the scaling."""
    pixels = small_source().test.fetch(np.arange(NUM_TEST)).astype(np.float32)
    inputs = torch.from_numpy((pixels / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    network = trainer.parts.model.eval()
    with torch.no_grad():
        return network(inputs.to(trainer.parts.device)).cpu()  # type: ignore[no-any-return]


def test_the_outcomes_are_those_of_the_network(ranks: Ranks, tmp_path: Path) -> None:
    job = small_job(evaluation={"batch_size": 7, "every_epochs": 0.5})
    trainer, _ = train(job, ranks, tmp_path, OutcomesFile(), recorder := Recorder())
    found, outputs = read_outcomes(tmp_path), logits(trainer)
    assert found is not None
    assert found.samples == trainer.plan.schedule.end_samples
    assert found.weights is None
    np.testing.assert_allclose(
        found.losses, functional.cross_entropy(outputs, LABELS, reduction="none").numpy(), rtol=1e-4, atol=1e-6
    )
    assert found.correct is not None
    np.testing.assert_array_equal(found.correct, (outputs.argmax(1) == LABELS).numpy())
    assert 0 < found.correct.sum() < NUM_TEST
    last = recorder.evaluations[-1]
    assert last.metrics["top1"] == found.correct.sum() / NUM_TEST
    assert [evaluation.outcomes is not None for evaluation in recorder.evaluations] == [
        evaluation.samples == found.samples for evaluation in recorder.evaluations
    ]
    assert evaluate(trainer.parts, trainer.state, ranks) == evaluate(
        trainer.parts, trainer.state, ranks, with_outcomes=True
    )


def test_a_bad_sample_that_is_skipped_has_no_outcome(ranks: Ranks, tmp_path: Path) -> None:
    samples = encoded_samples(tmp_path, 90)
    (tmp_path / "6.jpg").unlink()
    data = {
        **{"source": "image_folder", "num_samples": 90, "crop_padding": 0, "image_size": 12},
        "on_bad_sample": "replace",
    }
    job = small_job(data=data, schedule={"max_batch": 80}, evaluation={"batch_size": 16, "every_epochs": 3.0})
    source = Datasets(samples, samples, 7, (0.5,) * 3, (0.25,) * 3)
    _, ended = train(job, ranks, tmp_path / "run", OutcomesFile(), source=source)
    found = read_outcomes(tmp_path / "run")
    assert found is not None
    assert found.correct is not None
    assert np.flatnonzero(np.isnan(found.losses)).tolist() == [6]
    assert not found.correct[6]
    assert ended.evaluation is not None
    assert np.nanmean(found.losses.astype(np.float64)) == pytest.approx(ended.evaluation.loss, rel=1e-6)
    assert found.correct.sum() / 89 == pytest.approx(ended.evaluation.metrics["top1"])


@pytest.mark.parametrize("layout", [{}, {"exact": True, "max_micro_batch": None}])
def test_outcomes_do_not_change_the_run(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any]
) -> None:
    job, results = small_job(layout=layout), []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr("hvd_batchgrow.train.trainer.evaluate", without_outcomes)
        trainer, _ = train(job, ranks, tmp_path / name, recorder := Recorder())
        weights = [value.clone() for value in trainer.parts.model.state_dict().values()]
        results.append((recorder.evaluations, weights))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_task_without_correct_has_losses_and_weights(ranks: Ranks, tmp_path: Path) -> None:
    data = {"source": f"{HERE}:unused", "root": None}  # the test passes the source itself
    job = small_job(task={"name": f"{HERE}:Half"}, data=data, schedule={"boundaries_epochs": [0.4], "epochs": 0.8})
    # 50 samples in one batch: with two ranks, the second evaluates no sample.
    trainer, _ = train(job, ranks, tmp_path, OutcomesFile(), source=small_source())
    found = read_outcomes(tmp_path)
    assert found is not None
    assert found.correct is None
    np.testing.assert_array_equal(found.weights, np.full(NUM_TEST, 0.5, np.float32))
    each = functional.cross_entropy(logits(trainer), LABELS, reduction="none") / 2
    np.testing.assert_allclose(found.losses, each.numpy(), rtol=1e-4, atol=1e-6)
