"""Evaluation of the whole test set, split over all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.data.pipeline.reader import Reader
from hvd_batchgrow.train.liveness.watchdog import WAITING
from hvd_batchgrow.train.update.forward import as_parameters, autocast


def evaluate(
    model: nn.Module,
    reader: Reader,
    num_test: int,
    batch: int,
    ranks: Ranks,
    precision: str,
    at: Callable[[str], None],
) -> tuple[float, float]:
    """Return the mean loss and the fraction of correct answers over all test samples.

    Args:
        model: the network; it stays in evaluation mode afterwards.
        reader: reads the test samples.
        num_test: number of test samples.
        batch: samples per forward pass.
        ranks: all of them call this; each takes every R-th batch.
        precision: of the forward pass, as in `[update]`.
        at: called with the name of each stage that this rank enters.
    """
    chunks = [range(start, min(start + batch, num_test)) for start in range(0, num_test, batch)]
    sums = torch.zeros(3, dtype=torch.float64, device=reader.device)
    model.eval()
    with torch.no_grad():
        for part in reader.testing(chunks[ranks.rank :: ranks.size]):
            at("evaluating")
            with autocast(reader.device, precision):
                logits = model(as_parameters(part.inputs, model)).float()
            sums[0] += nn.functional.cross_entropy(logits, part.labels, reduction="sum")
            sums[1] += (logits.argmax(1) == part.labels).sum()
            sums[2] += len(part.labels)
    at(WAITING)
    loss, correct, count = ranks.sum(sums, "evaluation").tolist()
    return loss / count, correct / count
