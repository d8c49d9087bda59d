"""The loss of a record: which updates it counts, and with what weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.metric_window import MetricWindow
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.forward import MicroBatch


def update(loss_sum: float, weight: float, *, skipped: bool = False) -> UpdateResult:
    metrics = {"top1": (weight, 8.0)}
    return UpdateResult(loss_sum, weight, metrics, False, 0, (), skipped, 1.0, {})


def test_a_skipped_update_counts_if_its_loss_is_finite() -> None:
    window = MetricWindow()
    window.add(update(12.0, 4.0), 8)
    window.add(update(6.0, 2.0, skipped=True), 8)
    window.add(update(math.nan, 8.0, skipped=True), 8)
    window.add(update(math.inf, 8.0, skipped=True), 8)
    assert (window.updates, window.samples) == (4, 32)
    assert (window.loss, window.weight, window.metrics["top1"]) == (18.0, 6.0, (6.0, 16.0))


def test_the_loss_of_an_update_with_too_large_a_loss_scale_is_recorded() -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 1)
    inputs, targets = torch.randn(8, 4), torch.randn(8)
    with torch.no_grad():
        expected = float((network(inputs)[:, 0] - targets).square().mean())
    engine = UpdateEngine(
        network,
        torch.optim.SGD(network.parameters(), lr=0.1),
        SingleRank(),
        forward=lambda model, batch: Losses((model(batch.inputs)[:, 0] - batch.targets).square()),
        rule=UpdateSection(precision="float16"),
    )
    assert engine.loss_scale is not None
    engine.loss_scale.value = 2.0**127
    phase = Phase(
        start_epoch=0.0, lr=0.1, momentum=0.0, global_batch=8, wanted_batch=8.0, start_samples=0, num_updates=1
    )
    result = engine.update(iter([MicroBatch(inputs, targets, (0, 1))]), 1, phase, 2)
    window = MetricWindow()
    window.add(result, 8)
    assert result.skipped
    assert window.loss / window.weight == pytest.approx(expected, rel=1e-5)
