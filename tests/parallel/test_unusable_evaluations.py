"""A test loss that is infinite or NaN ends the run or is disregarded, on all ranks together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.observers.metrics import MetricsFile
from hvd_batchgrow.train.checkpoints.checkpoint import checkpoint_paths
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.train.trainer import Trainer
from tests.helpers import NUM_TRAIN, measured_job
from tests.training import Recorder, make_trainer

PLATEAU = {"name": "plateau", "min_delta": 9.0, "patience_epochs": 1.0, "noise_factor": 2.0}
"""Nothing is better by 9, so that the first evaluation stays the best."""


def trainer_of(
    ranks: Ranks, folder: Path, recorder: Recorder, bad: dict[float, float], on_nonfinite: str, **trigger: Any
) -> Trainer:
    """A run of 3.6 epochs, evaluated every half; `bad` maps an epoch to the value of its logits."""
    job = measured_job(
        PLATEAU | trigger,
        schedule={"epochs": 3.6},
        evaluation={"every_epochs": 0.5},
        update={"on_nonfinite": on_nonfinite},
    )
    observers = [recorder, MetricsFile()] if ranks.rank == 0 else [recorder]
    trainer = make_trainer(job, ranks, folder, *observers)

    def spoil(module: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        epoch = math.floor(2 * trainer.state.samples / NUM_TRAIN) / 2
        return logits * (1.0 if module.training else bad.get(epoch, 1.0))

    trainer.parts.model.register_forward_hook(spoil)
    return trainer


def epochs_of_decisions(recorder: Recorder) -> list[float]:
    return [math.floor(2 * decision.samples / NUM_TRAIN) / 2 for decision in recorder.decided]


@pytest.mark.parametrize(
    ("bad", "epochs"),
    [
        # The best at 0.5; 1.0, 1.5 and 2.0 are no better: 1.5 epochs, more than the patience of 1.
        ({}, [2.0, 3.5]),
        # The same 1.5 epochs without those of the two evaluations that gave nothing.
        ({1.0: math.nan, 1.5: math.inf}, [3.0]),
        # An infinite loss is not the best one either: the best is at 1.0.
        ({0.5: math.inf}, [2.5]),
    ],
)
def test_an_evaluation_without_a_finite_loss_is_neither_an_improvement_nor_patience(
    ranks: Ranks, tmp_path: Path, bad: dict[float, float], epochs: list[float]
) -> None:
    recorder = Recorder()
    trainer_of(ranks, tmp_path, recorder, bad, "skip").run(StopRequest())
    assert epochs_of_decisions(recorder) == epochs


def test_the_best_weights_are_never_those_of_an_evaluation_without_a_finite_loss(ranks: Ranks, tmp_path: Path) -> None:
    recorder = Recorder()
    # NaN logits have an accuracy too: that of the class that argmax picks.
    bad = {1.0: math.nan, 1.5: math.nan}
    trigger = {"metric": "top1", "min_delta": 0.99, "restore_best": True}
    trainer_of(ranks, tmp_path, recorder, bad, "skip", **trigger).run(StopRequest())
    (decision,) = recorder.decided
    assert decision.restore_samples is not None
    assert NUM_TRAIN / 2 <= decision.restore_samples < NUM_TRAIN
    if ranks.rank == 0:
        evaluations = [line for line in map(strictly, lines(tmp_path / "metrics.jsonl")) if line["kind"] == "eval"]
        losses = [line["loss"] for line in evaluations]
        assert [loss is None for loss in losses] == [False, True, True, False, False, False, False, False]
        for line in lines(tmp_path / "decisions.jsonl"):
            strictly(line)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def strictly(text: str) -> dict[str, Any]:
    """Parse JSON as readers do that know no NaN."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    line: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_by_default_a_test_loss_that_is_not_finite_ends_the_run_before_its_checkpoint(
    ranks: Ranks, tmp_path: Path, value: float
) -> None:
    with pytest.raises(CollectiveError) as failure:
        trainer_of(ranks, tmp_path, Recorder(), {1.0: value}, "stop").run(StopRequest())
    if ranks.rank != 0:
        assert failure.value.error is None
        return
    report = str(failure.value.error)
    assert "evaluation at sample 304 (epoch 1.01): the test loss is " in report  # 19 updates of 16 are the first >= 300
    assert "update.on_nonfinite = 'skip'" in report
    assert all("00304" not in path.name for path in checkpoint_paths(tmp_path / "checkpoints"))
