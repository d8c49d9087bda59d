"""Each result says whether it is of the validation or the test set."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvd_batchgrow.data.datasets.dataset import ArrayDataset
from hvd_batchgrow.data.source_checks import known_num_samples
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.console_tables import result_table
from hvd_batchgrow.observers.metrics import MetricsFile
from hvd_batchgrow.observers.progress import ProgressDisplay
from hvd_batchgrow.observers.tensorboard import TensorBoard
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.events import Evaluation, Observer, RunStarted
from hvd_batchgrow.train.update.non_finite import describe_evaluation
from tests.helpers import small_job
from tests.unit.test_watch import ended, evaluation, started

VALIDATION = replace(evaluation(720), loss=0.5, metrics={"top1": 0.8}, dataset="validation")
TEST = evaluation(720)


def split_run(folder: Path) -> RunStarted:
    job = small_job(data={"validation_fraction": 0.1})
    return replace(started(folder, 0), job=job, plan=compile_plan(job, 1, known_num_samples(job.data)))


def show(observer: Observer, start: RunStarted, *evaluations: Evaluation) -> None:
    observer.on_start(start)
    for one in evaluations:
        observer.on_evaluation(one)
    observer.on_end(replace(ended(start.folder), evaluation=evaluations[-1]))


def curves(folder: Path) -> dict[str, list[float]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [round(e.value, 6) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_has_separate_curves(tmp_path: Path) -> None:
    show(TensorBoard(), split_run(tmp_path), VALIDATION, TEST)
    assert curves(tmp_path) == {"val/loss": [0.5], "val/top1": [0.8], "test/loss": [0.6], "test/top1": [0.75]}


def test_tensorboard_keeps_its_tags_without_a_validation_set(tmp_path: Path) -> None:
    show(TensorBoard(), started(tmp_path, 0), replace(TEST, average_loss=0.25, average_metrics={"top1": 0.5}))
    assert curves(tmp_path) == {
        "val/loss": [0.6],
        "val/top1": [0.75],
        "val/average_loss": [0.25],
        "val/average_top1": [0.5],
    }


def test_metrics_name_the_set(tmp_path: Path) -> None:
    show(MetricsFile(), split_run(tmp_path), VALIDATION, TEST)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["dataset"], line["top1"]) for line in lines] == [
        ("eval", "validation", 0.8),
        ("eval", "test", 0.75),
    ]


def test_the_output_names_the_set_and_the_best_checkpoint(tmp_path: Path) -> None:
    console = PlainConsole(io.StringIO(), 200)
    lines = ProgressDisplay(console)
    show(lines, split_run(tmp_path), VALIDATION, TEST)
    lines.on_end(replace(ended(tmp_path), best="best val/top1 0.8000 at sample 720: best.pt"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "validation loss 0.5000, validation accuracy 80.00 %" in text
    assert "test loss 0.6000, test accuracy 75.00 %" in text
    assert "best val/top1 0.8000 at sample 720: best.pt" in text


def test_the_table_of_results_does_not_pass_off_a_validation_result_as_a_test(tmp_path: Path) -> None:
    runs = [("grow", replace(ended(tmp_path), evaluation=one)) for one in (VALIDATION, TEST, None)]
    column = next(column for column in result_table(runs).columns if column.header == "test\naccuracy")
    assert list(column.cells) == ["80.00 % (validation)", "75.00 %", "none"]


def test_a_loss_that_is_not_finite_is_reported_with_its_set() -> None:
    rows = np.ones((20, 3), np.float32)
    of_rows, failed = ArrayDataset(rows, np.zeros(20, np.int64), "rows.npy"), replace(VALIDATION, loss=float("nan"))
    text = describe_evaluation(failed, "float32", of_rows)
    assert "the validation loss is nan\n  a lower learning rate or a warm-up may prevent it" in text
    rows[17, 1] = np.inf
    text = describe_evaluation(failed, "float32", of_rows)
    assert text.endswith("is nan\n  the input of rows.npy, entry 17 has an infinite value: correct the data")
