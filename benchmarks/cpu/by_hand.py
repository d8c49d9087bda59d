"""The contestants written by hand: python -m benchmarks.cpu.by_hand KIND CASE SIZE BATCH UPDATES.

KIND is loop, loop_channels_last, ddp or horovod."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import distributed, nn

from benchmarks.contestants import LR, MOMENTUM, WEIGHT_DECAY
from benchmarks.cpu.bare_loop import accumulating, augmented, shuffled
from benchmarks.cpu.cases import MICRO_BATCH, case_of, job_of_case, network_by_hand
from benchmarks.cpu.contestant import serve
from hvd_batchgrow.data.load_source import load_source


def main() -> None:
    """Train in turns, as one rank of those that mpirun has started."""
    kind, case_name, size, batch, num_updates = sys.argv[1:]
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    num_ranks = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    case = case_of(case_name, is_tiny=size == "tiny")
    source = load_source(job_of_case(case, 128).data, 0, lambda *_: None)
    channels_last = kind.endswith("channels_last")
    network = network_by_hand(case)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    share = int(batch) // num_ranks
    passes = share // MICRO_BATCH
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    trained: nn.Module = network
    without_sum: Callable[[], AbstractContextManager[object]] = nullcontext
    if kind == "ddp":
        distributed.init_process_group("gloo", rank=rank, world_size=num_ranks)
        trained = ddp = nn.parallel.DistributedDataParallel(network)
        without_sum = ddp.no_sync
    elif kind == "horovod":
        import horovod.torch as hvd

        hvd.init()
        hvd.broadcast_parameters(network.state_dict(), root_rank=0)
        optimizer = hvd.DistributedOptimizer(
            optimizer, named_parameters=network.named_parameters(), backward_passes_per_step=passes
        )
    load = augmented(source, case.data["crop_padding"], channels_last=channels_last)
    work = accumulating(
        trained, optimizer, load, shuffled(len(source.train), share), MICRO_BATCH, int(num_updates), without_sum
    )
    work()  # before the first turn, as in the other contestants
    if rank == 0:
        serve(work)
        os._exit(0)
    while True:  # as fast as rank 0 allows: an update needs all ranks
        work()


if __name__ == "__main__":
    main()
