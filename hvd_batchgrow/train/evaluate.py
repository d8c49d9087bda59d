"""The whole test set, once, over all ranks."""

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
    """Mean loss, and share of right answers, over every test sample.

    Args:
        model: is left in evaluation.
        reader: of the samples.
        num_test: how many there are.
        batch: samples of one forward.
        ranks: all of them call this; each takes every R-th batch.
        precision: of the forward, as in `[update]`.
        at: told what this rank does, as it goes on.
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
