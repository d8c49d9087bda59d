"""Ranks over torch.distributed (Gloo or NCCL). Only this file imports it."""

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

from hvd_batchgrow.comm.launcher_env import MPI_LAUNCHERS, TORCHRUN, launched_by, launched_ranks
from hvd_batchgrow.comm.ordered_collectives import Operation, OrderedCollectives
from hvd_batchgrow.comm.ranks import HostTopology, Ranks
from hvd_batchgrow.comm.rendezvous import meeting_point
from hvd_batchgrow.messages.errors import RunError

# A rank waits for another that downloads data or evaluates, however long that takes. If the peer ends, its
# connection closes, and that ends the wait.
_COLLECTIVE_TIMEOUT = timedelta(days=30)
_JOIN_TIMEOUT = timedelta(minutes=5)


class TorchRanks(Ranks):
    """Ranks in a process group of torch.distributed.

    torch.distributed matches collectives by the order in which they are issued, and `Ranks` by name. So all ranks
    issue them in rank 0's order, see `OrderedCollectives`.

    Args:
        data: the group for the collectives.
        control: a Gloo group of the same ranks, for their order.
        hosts: a number for the host of each rank; None: find it out by a collective.
    """

    sum_types = (torch.float16, torch.bfloat16)

    def __init__(self, data: Any, control: Any, hosts: Sequence[int] | None = None) -> None:
        self._data, self._control = data, control
        self.rank, self.size = dist.get_rank(data), dist.get_world_size(data)
        self._order = OrderedCollectives(self.rank, self._broadcast_key)
        place = HostTopology.among(hosts or self.hosts(), self.rank)
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self.sums_on_gpu = _has_nccl() and self.local_size <= torch.cuda.device_count()
        self.backend = "torch-nccl" if self.sums_on_gpu else "torch-gloo"
        self._parts: dict[int, TorchRanks | None] = {}

    def start_sum(self, tensor: Tensor, name: str) -> Operation:
        """Start an all-reduce in place; on a GPU it runs after the work already queued on the tensor's stream."""
        return self._start(tensor, name, lambda: dist.all_reduce(tensor, group=self._data, async_op=True))

    def wait(self, handle: Operation) -> None:
        """Block until an all-reduce has finished. Raises RunError when a peer is lost."""
        handle.wait()

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor with rank 0's."""
        values = tensor.detach()
        self._start(values, name, lambda: dist.broadcast(values, 0, group=self._data, async_op=True)).wait()

    def abort(self, code: int) -> None:
        """End all ranks: MPI kills them, or the launcher does because this process fails."""
        if launched_by(os.environ) in MPI_LAUNCHERS and (world := _mpi_world()):
            world.Abort(code)
        os._exit(code)

    def close(self) -> None:
        """Shut down once all ranks have finished: a launcher may end all ranks when one ends, while rank 0 writes."""
        self.sum(torch.zeros(1), "close")
        for ranks in (self, *filter(None, self._parts.values())):
            ranks._order.close()
            # Drop the last references to the groups, which ends Gloo's threads. If one of them still frees a
            # tensor while Python exits, the process aborts.
            ranks._data = ranks._control = None
        dist.destroy_process_group()

    def rendezvous_info(self) -> bytes:
        """Return nothing: the ranks stay connected."""
        return b""

    def reinit(self, hosts: Sequence[int], info: bytes) -> TorchRanks | None:
        """Return a group of these ranks, made once per size. Idle ranks stay in the group of all at no cost."""
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
            # This runs on another thread, so its stream must wait for the work that computes the tensor.
            with torch.cuda.stream(torch.cuda.Stream(tensor.device)):
                torch.cuda.current_stream(tensor.device).wait_event(ready)
                return operate()

        return self._order.start(name, issue)

    def _broadcast_key(self, key: int) -> int:
        """Return rank 0's key on all ranks."""
        message = torch.tensor([key])
        dist.broadcast(message, 0, group=self._control)
        return int(message)


def join() -> TorchRanks:
    """Join the ranks that the launcher has started.

    Raises:
        RunError: this torch has no torch.distributed, or the ranks do not find each other.
    """
    if not dist.is_available():
        raise RunError("this torch is built without torch.distributed: use --backend horovod, or another torch")
    rank, size = launched_ranks(os.environ)
    try:
        store = _store(rank, size)
        dist.init_process_group(_backend(), store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT)
        return TorchRanks(dist.group.WORLD, _new_group(size, "gloo"))
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"rank {rank} of {size} cannot join the others: {error}") from None


def _store(rank: int, size: int) -> Any:
    """Return the store through which the ranks first connect; rank 0 or torchrun serves it."""
    launcher = launched_by(os.environ)
    if launcher == TORCHRUN:
        return next(iter(rendezvous("env://", rank, size, timeout=_JOIN_TIMEOUT)))[0]
    world = _mpi_world() if launcher in MPI_LAUNCHERS else None
    if world is None:
        host, port = meeting_point(os.environ, size)
        return TCPStore(host, port, size, is_master=rank == 0, timeout=_JOIN_TIMEOUT, wait_for_workers=False)
    # Rank 0 binds a free port and broadcasts it over MPI, so two jobs cannot use the same port.
    store = None
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, size, is_master=True, timeout=_JOIN_TIMEOUT, wait_for_workers=False)
    from mpi4py import MPI

    on_one_host = world.Split_type(MPI.COMM_TYPE_SHARED).size == size
    address = ("127.0.0.1" if on_one_host else socket.gethostname(), store.port) if store else None
    host, port = world.bcast(address)
    return store or TCPStore(host, port, size, is_master=False, timeout=_JOIN_TIMEOUT)


def _mpi_world() -> Any:
    """Return mpi4py's COMM_WORLD if mpi4py is usable and sees all ranks that the launcher has started, else None."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # the latter: no MPI library
        return None
    return MPI.COMM_WORLD if launched_ranks(os.environ)[1] == MPI.COMM_WORLD.size else None


def _new_group(count: int, backend: str) -> Any:
    """Return a group of the first `count` ranks; all ranks of the job call it together."""
    return dist.new_group(list(range(count)), backend=backend, timeout=_COLLECTIVE_TIMEOUT)


def _has_nccl() -> bool:
    return torch.cuda.is_available() and dist.is_nccl_available()


def _backend() -> str:
    """Return NCCL for CUDA tensors, if available, and Gloo for the rest."""
    return "cpu:gloo,cuda:nccl" if _has_nccl() else "gloo"
