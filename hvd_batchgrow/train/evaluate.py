"""Evaluation of the whole validation or test set, split over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.data.datasets.dataset import Dataset
from hvd_batchgrow.data.tensor_tree import num_rows
from hvd_batchgrow.nn.parameters import network_inputs
from hvd_batchgrow.nn.state.forward_state import restored_buffers
from hvd_batchgrow.tasks.checked_losses import losses_of
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.events import EvaluatedSet, Evaluation, Results
from hvd_batchgrow.train.liveness.watchdog import WAITING
from hvd_batchgrow.train.metric_window import mean
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.sample_outcomes import OutcomeCollector
from hvd_batchgrow.train.train_state import TrainState
from hvd_batchgrow.train.update.forward import autocast, widened


def evaluate(
    parts: TrainingParts,
    state: TrainState,
    ranks: Ranks,
    dataset: EvaluatedSet = "test",
    *,
    with_outcomes: bool = False,
) -> Evaluation:
    """Return loss and metrics of the weights and, if the job keeps an average of them, of the average.

    Args:
        parts: of this rank; the network is in evaluation mode afterwards.
        state: of the run.
        ranks: all of them call this.
        dataset: the set to evaluate; the source must have it.
        with_outcomes: whether to return the outcome of each sample too.
    """
    samples = parts.source.validation if dataset == "validation" else parts.source.test
    assert samples is not None
    collector = OutcomeCollector() if with_outcomes else None
    loss, metrics = _results(parts, ranks, samples, collector)
    outcomes = None
    if collector:
        outcomes = collector.collect(len(samples), state.samples, ranks)
    if state.average is None:
        return Evaluation(state.samples, state.epoch, loss, metrics, dataset=dataset, outcomes=outcomes)
    with state.average.in_place():
        averages = _results(parts, ranks, samples)
    return Evaluation(state.samples, state.epoch, loss, metrics, *averages, dataset=dataset, outcomes=outcomes)


def _chunks_of_rank(parts: TrainingParts, ranks: Ranks, samples: Dataset) -> list[range]:
    """Return the batches that this rank evaluates: every R-th one."""
    num_samples, batch = len(samples), parts.job.evaluation.batch_size
    chunks = [range(start, min(start + batch, num_samples)) for start in range(0, num_samples, batch)]
    return chunks[ranks.rank :: ranks.size]


def _results(
    parts: TrainingParts, ranks: Ranks, samples: Dataset, collector: OutcomeCollector | None = None
) -> Results:
    """Return the mean loss and the metrics of a set."""
    names = list(parts.task.metrics)
    sums = torch.zeros(2 + 2 * len(names), dtype=torch.float64, device=parts.device)
    parts.model.eval()
    with torch.no_grad(), restored_buffers(parts.model, parts.forward_state.in_evaluation):
        for part in parts.reader.testing(_chunks_of_rank(parts, ranks, samples), samples):
            parts.heartbeat.at("evaluating")
            with autocast(parts.device, parts.job.update.precision):
                outputs = parts.model(network_inputs(part.inputs, parts.model))
            losses = losses_of(parts.task, widened(outputs), part.targets, num_rows(part.inputs), training=False)
            _add(sums, losses, names)
            if collector:
                collector.add(losses, part.ids)
    parts.heartbeat.at(WAITING)
    loss, weight, *totals = ranks.all_reduce(sums, "evaluation").tolist()
    metrics = {name: mean(*totals[2 * k : 2 * k + 2]) for k, name in enumerate(names)}
    return mean(loss, weight), metrics


def _add(sums: Tensor, losses: Losses, names: list[str]) -> None:
    """Add loss, weight, and sum and count of each metric, without waiting for the device."""
    sums[0] += losses.each.double().sum()
    sums[1] += len(losses.each) if losses.weights is None else losses.weights.double().sum()
    for k, name in enumerate(names):
        for part in (0, 1):
            sums[2 + 2 * k + part] += losses.metrics[name][part]
