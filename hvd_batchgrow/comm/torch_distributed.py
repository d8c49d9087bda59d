"""Ranks through torch.distributed, Gloo and NCCL: the one file that imports it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.rendezvous import rendezvous

from hvd_batchgrow.comm.launcher_env import OF_MPI, TORCHRUN, launched_by, launched_ranks
from hvd_batchgrow.comm.ordered_collectives import IssueOrder, Operation
from hvd_batchgrow.comm.ranks import HostTopology, Ranks
from hvd_batchgrow.comm.rendezvous import meeting_point
from hvd_batchgrow.messages.errors import RunError

# A rank may wait for another that downloads data or evaluates, for as long as that takes: a peer that is
# gone closes its connection, and that is what ends a wait.
_WAIT = timedelta(days=30)
_JOIN = timedelta(minutes=5)


class TorchRanks(Ranks):
    """Ranks in a group of torch.distributed.

    torch.distributed matches operations by the order in which they are issued, `Ranks` by name: rank
    0's order holds for all, see `IssueOrder`.

    Args:
        data: the group that adds.
        control: a Gloo group of the same ranks, for the order.
        hosts: a number for the host of each of them; None: ask them.
    """

    sum_types = (torch.float16, torch.bfloat16)

    def __init__(self, data: Any, control: Any, hosts: Sequence[int] | None = None) -> None:
        self._data, self._control = data, control
        self.rank, self.size = dist.get_rank(data), dist.get_world_size(data)
        self._order = IssueOrder(self.rank, self._tell_next)
        place = HostTopology.among(hosts or self.hosts(), self.rank)
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self.sums_on_gpu = _has_nccl() and self.local_size <= torch.cuda.device_count()
        self.backend = "torch-nccl" if self.sums_on_gpu else "torch-gloo"
        self._parts: dict[int, TorchRanks | None] = {}

    def start_sum(self, tensor: Tensor, name: str) -> Operation:
        """Start summing in place, on a thread of its own; on a GPU, after what its stream has still to do."""
        return self._start(tensor, name, lambda: dist.all_reduce(tensor, group=self._data, async_op=True))

    def wait(self, handle: Operation) -> None:
        """Block until a sum is there. Raises RunError when a peer is lost."""
        handle.wait()

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite by rank 0's."""
        values = tensor.detach()
        self._start(values, name, lambda: dist.broadcast(values, 0, group=self._data, async_op=True)).wait()

    def abort(self, code: int) -> None:
        """End all ranks at once: MPI kills them, or the launcher does when one of its processes fails."""
        if launched_by(os.environ) in OF_MPI and (world := _mpi_world()):
            world.Abort(code)
        os._exit(code)

    def close(self) -> None:
        """Leave once all ranks are there: a launcher ends the others when one ends, and rank 0 may still write."""
        self.sum(torch.zeros(1), "close")
        for ranks in (self, *filter(None, self._parts.values())):
            ranks._order.close()
            # Gloo's threads end with their group, and that with the last that knows it. One that is still
            # letting go of its last tensor when Python ends aborts the process.
            ranks._data = ranks._control = None
        dist.destroy_process_group()

    def rendezvous_info(self) -> bytes:
        """The ranks know how to reach each other."""
        return b""

    def reinit(self, hosts: Sequence[int], prepared: bytes) -> TorchRanks | None:
        """A group of these ranks, made once; those that wait stay in the group of all, which costs nothing."""
        count = len(hosts)
        if count == self.size:
            return self
        if count not in self._parts:
            data, control = _new_group(count, _backend()), _new_group(count, "gloo")
            self._parts[count] = TorchRanks(data, control, hosts) if self.rank < count else None
        return self._parts[count]

    def _start(self, tensor: Tensor, name: str, operate: Callable[[], Any]) -> Operation:
        if not tensor.is_cuda:
            return self._order.start(name, operate)
        ready = torch.cuda.current_stream(tensor.device).record_event()

        def issue() -> Any:
            # This runs on another thread, whose stream knows nothing of what the tensor waits for.
            with torch.cuda.stream(torch.cuda.Stream(tensor.device)):
                torch.cuda.current_stream(tensor.device).wait_event(ready)
                return operate()

        return self._order.start(name, issue)

    def _tell_next(self, key: int) -> int:
        """Rank 0's key, on all ranks."""
        message = torch.tensor([key])
        dist.broadcast(message, 0, group=self._control)
        return int(message)


def join() -> TorchRanks:
    """Join the ranks that the launcher has started.

    Raises:
        RunError: this torch cannot, or the ranks do not find each other.
    """
    if not dist.is_available():
        raise RunError("this torch is built without torch.distributed: --backend horovod, or another torch")
    rank, size = launched_ranks(os.environ)
    try:
        store = _store(rank, size)
        dist.init_process_group(_backend(), store=store, rank=rank, world_size=size, timeout=_WAIT)
        return TorchRanks(dist.group.WORLD, _new_group(size, "gloo"))
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"rank {rank} of {size} cannot join the others: {error}") from None


def _store(rank: int, size: int) -> Any:
    """Where the ranks first meet; rank 0 serves it, or torchrun does."""
    launcher = launched_by(os.environ)
    if launcher == TORCHRUN:
        return next(iter(rendezvous("env://", rank, size, timeout=_JOIN)))[0]
    world = _mpi_world() if launcher in OF_MPI else None
    if world is None:
        host, port = meeting_point(os.environ, size)
        return TCPStore(host, port, size, is_master=rank == 0, timeout=_JOIN, wait_for_workers=False)
    # Rank 0 takes a free port and tells it: no other job can have it.
    store = TCPStore("127.0.0.1", 0, size, is_master=True, timeout=_JOIN, wait_for_workers=False) if not rank else None
    from mpi4py import MPI

    on_one_host = world.Split_type(MPI.COMM_TYPE_SHARED).size == size
    mine = ("127.0.0.1" if on_one_host else socket.gethostname(), store.port) if store else None
    host, port = world.bcast(mine)
    return store or TCPStore(host, port, size, is_master=False, timeout=_JOIN)


def _mpi_world() -> Any:
    """mpi4py's world, if it is there and knows the ranks that the launcher has started."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # the latter: no MPI library
        return None
    return MPI.COMM_WORLD if launched_ranks(os.environ)[1] == MPI.COMM_WORLD.size else None


def _new_group(count: int, backend: str) -> Any:
    """A group of the first ranks; all ranks of the job call it together."""
    return dist.new_group(list(range(count)), backend=backend, timeout=_WAIT)


def _has_nccl() -> bool:
    return torch.cuda.is_available() and dist.is_nccl_available()


def _backend() -> str:
    """NCCL, where it is there, for what lies on GPUs, and Gloo for the rest."""
    return "cpu:gloo,cuda:nccl" if _has_nccl() else "gloo"
