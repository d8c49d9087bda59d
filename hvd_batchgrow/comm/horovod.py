"""Ranks through Horovod, under MPI or Gloo: the one file that imports it."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from hvd_batchgrow.comm.launch import GLOO, launched_by
from hvd_batchgrow.comm.ranks import Ranks

# Gradients come as a few large buckets: merging them would cost a copy, and would let timing decide
# the order of additions, and so the last bits of a sum over three or more ranks.
os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
# Horovod's thread waits inside MPI beside a core's training thread: spinning there took a third of the
# throughput of two ranks on two cores.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")

if launched_by(os.environ) != GLOO:
    with contextlib.suppress(ImportError):
        # Before Horovod: then hvd.shutdown() leaves MPI for mpi4py to finalise.
        from mpi4py import MPI

import horovod.torch as hvd
import torch
from torch import Tensor


class HorovodRanks(Ranks):
    """All ranks that mpirun or horovodrun started."""

    sum_types = (torch.float16,)  # Horovod 0.28.1 knows no bfloat16

    def __init__(self) -> None:
        hvd.init()
        self.under_mpi = bool(hvd.mpi_enabled())
        self.backend = "horovod-mpi" if self.under_mpi else "horovod-gloo"
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.sums_on_gpu = bool(hvd.nccl_built())

    def start_sum(self, tensor: Tensor, name: str) -> Any:
        """Start summing in place. Raises as Horovod does when a peer is lost."""
        return hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)

    def wait(self, handle: Any) -> None:
        """Block until a sum is there."""
        hvd.synchronize(handle)

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite by rank 0's."""
        with torch.no_grad():
            hvd.broadcast_(tensor, 0, name=name)

    def abort(self, code: int) -> None:
        """End all ranks at once: MPI kills them; horovodrun does when one of its processes fails."""
        if self.under_mpi and "MPI" in globals():
            MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    def close(self) -> None:
        """Shut Horovod down, once all ranks are there.

        horovodrun ends the others when one ends with another code than 0: rank 0 may still be writing.
        """
        self.sum(torch.zeros(1), "close")
        hvd.shutdown()
