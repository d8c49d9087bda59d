"""Ranks over torch.distributed (Gloo or NCCL). Only this file imports it."""

from __future__ import annotations

import gc
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.rendezvous import rendezvous

from hvd_batchgrow.comm.launcher_env import MPI_LAUNCHERS, TORCHRUN, launched_by, launched_ranks, restarts_ranks
from hvd_batchgrow.comm.ranks import HostTopology, Ranks
from hvd_batchgrow.comm.rendezvous import meeting_point
from hvd_batchgrow.messages.errors import ExitCode, RunError

# A rank waits for another that downloads data or evaluates, however long that takes. If the peer ends, its
# connection closes, and that ends the wait.
_COLLECTIVE_TIMEOUT = timedelta(days=30)
_JOIN_TIMEOUT = timedelta(minutes=5)
_CONNECTION = r"gloo/transport|[Cc]onnection |by peer|[Tt]imed out|Broken pipe"
"""In Gloo's errors of a connection."""


class TorchRanks(Ranks):
    """Ranks in a process group of torch.distributed.

    Args:
        group: the process group.
        hosts: a number for the host of each rank; None: find it out by a collective.
        backends: of the group.
        is_guest: whether the script has initialized torch.distributed, and will shut it down.
    """

    sum_types = (torch.float16, torch.bfloat16)
    sums_on_gpu = shares_gpus = True  # Gloo sums CUDA tensors too

    def __init__(
        self, group: Any, hosts: Sequence[int] | None = None, backends: str = "gloo", *, is_guest: bool = False
    ) -> None:
        self._group = group
        self._backends = backends
        self._is_guest = is_guest
        self.restarts = restarts_ranks(os.environ)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        place = HostTopology.among(hosts or self.hosts(), self.rank)
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self.backend, self.collectives = "torch-gloo", "Gloo"
        self._parts: dict[int, TorchRanks | None] = {}

    def start_all_reduce(self, tensor: Tensor, name: str) -> Any:
        """Start an all-reduce in place; on a GPU it runs after the work already queued on the current stream."""
        with _lost_rank(name):
            return dist.all_reduce(tensor, group=self._group, async_op=True), name

    def wait(self, handle: Any) -> None:
        """Block until an all-reduce has finished. Raises RunError when a peer is lost."""
        work, name = handle
        with _lost_rank(name):
            work.wait()

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor with rank 0's. Raises RunError when a peer is lost."""
        with _lost_rank(name):
            dist.broadcast(tensor.detach(), 0, group=self._group)

    def abort(self, code: int) -> None:
        """End all ranks: MPI kills them, or the launcher does because this process fails."""
        if launched_by(os.environ) in MPI_LAUNCHERS and (world := _mpi_world()):
            world.Abort(code)
        os._exit(code)

    def close(self) -> None:
        """Shut down once all ranks have finished: a launcher may end all ranks when one ends, while rank 0 writes."""
        self.all_reduce(torch.zeros(1), "close")
        for ranks in (self, *filter(None, self._parts.values())):
            # Drop the last references to the groups, which ends Gloo's threads. If one of them still frees a
            # tensor while Python exits, the process aborts.
            ranks._group = None
        gc.collect()  # a DistributedDataParallel that is no longer used has a reference, in a cycle
        if not self._is_guest:
            dist.destroy_process_group()

    def use_gpus(self, *, shared: bool) -> None:
        """Sum CUDA tensors over NCCL, or over Gloo if ranks share a GPU or this torch has no NCCL."""
        if shared or not dist.is_nccl_available() or self.backend == "torch-nccl":
            return
        self._backends, self.backend = "cpu:gloo,cuda:nccl", "torch-nccl"
        self.collectives = "NCCL"
        self._group = dist.new_group(list(range(self.size)), backend=self._backends, timeout=_COLLECTIVE_TIMEOUT)
        self._connect_gpus()

    def _connect_gpus(self) -> None:
        """Make NCCL connect these ranks now, while they are together, if it sums their CUDA tensors.

        NCCL would do it at the first all-reduce, and fail if a rank, which may be compiling, comes 5 minutes late.
        """
        if "nccl" in self._backends:
            self.all_reduce(torch.zeros(1, device="cuda"), "connect GPUs")

    def reinit(self, hosts: Sequence[int], info: bytes) -> TorchRanks | None:
        """Return a group of these ranks, made once per size. Idle ranks stay in the group of all at no cost."""
        count = len(hosts)
        if count == self.size:
            return self
        if count not in self._parts:
            # All ranks of the job make the group together.
            group = dist.new_group(list(range(count)), backend=self._backends, timeout=_COLLECTIVE_TIMEOUT)
            self._parts[count] = part = TorchRanks(group, hosts, self._backends) if self.rank < count else None
            if part is not None:
                part._connect_gpus()
        return self._parts[count]


@contextmanager
def _lost_rank(name: str) -> Iterator[None]:
    """Raise RunError where the backend reports that another rank is lost; note the collective in other errors."""
    try:
        yield
    except RuntimeError as error:
        # Gloo raises plain RuntimeErrors; NCCL and the store raise a DistError.
        if isinstance(error, dist.DistError) or re.search(_CONNECTION, str(error)):
            raise lost(error) from None
        error.add_note(f"in the collective {name!r}")
        raise


def lost(fault: Exception) -> RunError:
    """Return the error to raise when the backend reports that a peer is lost."""
    first_line = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
    then = "; torchrun starts the ranks again if restarts are left" if restarts_ranks(os.environ) else ""
    return RunError(f"another rank has ended or cannot be reached any more ({first_line}){then}")


def join_initialized() -> TorchRanks:
    """Return the ranks of the script's own `init_process_group`, in a separate group. All ranks call it together."""
    return TorchRanks(dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT), is_guest=True)


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
        with _ending_after(
            _JOIN_TIMEOUT, f"rank {rank} of {size} cannot join the others: one of them has not answered"
        ):
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT)
            return TorchRanks(dist.group.WORLD)
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"rank {rank} of {size} cannot join the others: {error}") from None


@contextmanager
def _ending_after(timeout: timedelta, why: str) -> Iterator[None]:
    """End this process if the block takes too long: ranks that connect to a killed rank would wait forever."""

    def end() -> None:
        print(f"{why} for {timeout.total_seconds():.0f} s", file=sys.stderr, flush=True)
        os._exit(ExitCode.FAILURE)

    timer = threading.Timer(timeout.total_seconds(), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _store(rank: int, size: int) -> Any:
    """Return the store through which the ranks first connect; rank 0 or torchrun serves it."""
    launcher = launched_by(os.environ)
    if launcher == TORCHRUN:
        store = next(iter(rendezvous("env://", rank, size, timeout=_JOIN_TIMEOUT)))[0]
        # torchrun may serve all attempts from one store, which keeps the addresses of ranks that have ended. The
        # attempts of several torchrun processes have no common number: `notes_on_restarts`.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        return store
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
