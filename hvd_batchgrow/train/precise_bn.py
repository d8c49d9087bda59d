"""Re-estimation of the running statistics by all ranks together."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.data.order.stream import ghost_batches_left, micro_batches_of_rank
from hvd_batchgrow.nn.ghost.running_statistics import set_running_statistics, sum_statistics
from hvd_batchgrow.nn.parameters import network_inputs
from hvd_batchgrow.nn.state.forward_state import restored_buffers
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.update.exact_sums import join, split
from hvd_batchgrow.train.update.forward import autocast
from hvd_batchgrow.train.update.micro_batches import read_micro_batches


def reestimate(parts: TrainingParts, samples: int, micro_batch: int, ranks: Ranks) -> bool:
    """If the job sets `precise_bn_samples`, re-estimate the running statistics from that many of the last samples.

    In exact mode the statistics are summed without rounding, so that they are bit-identical in all layouts.

    Args:
        parts: of this rank, with equal weights on all ranks.
        samples: the sample counter.
        micro_batch: number of samples per forward pass, a multiple of γ.
        ranks: all of them call this.

    Returns:
        whether the job sets `precise_bn_samples`.

    Raises:
        ValueError: no sample has been seen, or the model has no ghost norm.
    """
    job, model, ghost_batch = parts.job, parts.model, parts.job.model.ghost_batch
    if job.model.precise_bn_samples is None:
        return False
    recent = min(samples, -(-job.model.precise_bn_samples // ghost_batch) * ghost_batch)
    passes = micro_batches_of_rank(samples - recent, recent, ghost_batch, micro_batch, ranks.rank, ranks.size)
    update = (samples - recent) // ghost_batch, recent // ghost_batch, micro_batch // ghost_batch, ranks.size
    ghost_batches = parts.ghost_batches(
        samples - recent, ranks, lambda index: ghost_batches_left(index, *update), keep_prefetched=True
    )
    micro_batches = read_micro_batches(ghost_batches, passes, None, lambda _: parts.heartbeat.at("re-estimating"))
    exact = job.layout.exact
    with restored_buffers(model, parts.forward_state.in_evaluation), autocast(parts.device, job.update.precision):
        inputs = (network_inputs(micro_batch.inputs, model) for micro_batch in micro_batches)
        sums, counts = sum_statistics(model, inputs, _exact_parts if exact else _plain)
        flat = torch.cat([*(total.reshape(-1) for total in sums), counts.to(sums[0].device)])
        ranks.all_reduce(flat, "running statistics")
        *summed, all_counts = flat.split([*(total.numel() for total in sums), len(counts)])
        shaped = [part.view_as(total) for part, total in zip(summed, sums, strict=True)]
        set_running_statistics(model, [join(part) if exact else part for part in shaped], all_counts)
    return True


def _plain(statistics: Tensor) -> Tensor:
    return statistics.sum(0)


def _exact_parts(statistics: Tensor) -> Tensor:
    return split(statistics).sum(1)
