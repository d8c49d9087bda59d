"""Evaluation of the whole validation or test set, split over all ranks."""

from __future__ import annotations

import torch
from torch import nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.data.datasets.dataset import Dataset
from hvd_batchgrow.nn.state.forward_state import restored_buffers
from hvd_batchgrow.train.events import EvaluatedSet, Evaluation
from hvd_batchgrow.train.liveness.watchdog import WAITING
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.train_state import TrainState
from hvd_batchgrow.train.update.forward import as_parameters, autocast


def evaluate(parts: TrainingParts, state: TrainState, ranks: Ranks, dataset: EvaluatedSet = "test") -> Evaluation:
    """Return loss and accuracy of the weights and, if the job keeps an average of them, of the average.

    Args:
        parts: of this rank; the network is in evaluation mode afterwards.
        state: of the run.
        ranks: all of them call this.
        dataset: the set to evaluate; the source must have it.
    """
    samples = parts.source.validation if dataset == "validation" else parts.source.test
    assert samples is not None
    loss, top1 = _loss_and_top1(parts, ranks, samples)
    if state.average is None:
        return Evaluation(state.samples, state.epoch, loss, top1, dataset=dataset)
    with state.average.in_place():
        averages = _loss_and_top1(parts, ranks, samples)
        return Evaluation(state.samples, state.epoch, loss, top1, *averages, dataset=dataset)


def _loss_and_top1(parts: TrainingParts, ranks: Ranks, samples: Dataset) -> tuple[float, float]:
    """Return the mean loss and the fraction of correct answers; each rank takes every R-th batch of the samples."""
    num_samples, batch = len(samples), parts.job.evaluation.batch_size
    chunks = [range(start, min(start + batch, num_samples)) for start in range(0, num_samples, batch)]
    sums = torch.zeros(3, dtype=torch.float64, device=parts.device)
    parts.model.eval()
    with torch.no_grad(), restored_buffers(parts.model, parts.forward_state.in_evaluation):
        for part in parts.reader.testing(chunks[ranks.rank :: ranks.size], samples):
            parts.heartbeat.at("evaluating")
            with autocast(parts.device, parts.job.update.precision):
                logits = parts.model(as_parameters(part.inputs, parts.model)).float()
            sums[0] += nn.functional.cross_entropy(logits, part.targets, reduction="sum")
            sums[1] += (logits.argmax(1) == part.targets).sum()
            sums[2] += len(part.targets)
    parts.heartbeat.at(WAITING)
    loss, correct, count = ranks.sum(sums, "evaluation").tolist()
    return loss / count, correct / count
