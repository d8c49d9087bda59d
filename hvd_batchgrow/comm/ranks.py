"""Ranks: the collectives by which the processes of a job train together."""

from __future__ import annotations

import os
import secrets
import socket
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvd_batchgrow.comm.wakeup import WakeupClient, WakeupServer
from hvd_batchgrow.messages.errors import ExitCode, JobError, RunError

T = TypeVar("T")


@dataclass(frozen=True)
class HostTopology:
    """A rank's place among ranks of one or several hosts, as Horovod defines it."""

    local_rank: int
    local_size: int
    cross_rank: int
    """Number of earlier hosts that have a rank with this local rank."""
    cross_size: int

    @classmethod
    def among(cls, hosts: Sequence[int], rank: int) -> HostTopology:
        """Return the place of `rank`, where `hosts[r]` is the host of rank r."""
        local_sizes = Counter(hosts)  # in the order of the hosts' first ranks
        local_rank = Counter(hosts[:rank])[hosts[rank]]
        across = [host for host, size in local_sizes.items() if size > local_rank]
        return cls(local_rank, local_sizes[hosts[rank]], across.index(hosts[rank]), len(across))


class Ranks(ABC):
    """The processes that train together.

    All ranks start the same collectives in the same order. Each has a name, by which Horovod matches them and reports
    those that some ranks have not started.
    """

    backend: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    """Ranks on this host."""
    sums_on_gpu: bool
    """Whether `start_all_reduce` accepts CUDA tensors."""
    shares_gpus = False
    """Whether several ranks may use one GPU."""
    sum_types: tuple[torch.dtype, ...]
    """16-bit types that `start_all_reduce` accepts in addition to float32, float64 and int64."""
    collectives = ""
    """Library that sums gradients: "MPI", "Gloo" or "NCCL"; empty for a single process."""
    elastic = False
    """Whether ranks may join and leave while the job runs."""
    restarts = False
    """Whether the launcher starts all ranks again, as new processes, if ranks join, leave or fail."""
    _idle: tuple[WakeupClient, list[int]] | None = None
    """While a subset trains without this rank: its connection to rank 0, and the host of each rank."""

    @abstractmethod
    def start_all_reduce(self, tensor: Tensor, name: str) -> Any:
        """Start an all-reduce (sum) of a contiguous tensor, in place; return a handle for `wait`."""

    @abstractmethod
    def wait(self, handle: Any) -> None:
        """Block until the all-reduce of a handle has finished."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite a contiguous tensor with rank 0's."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """End all ranks at once with an exit code, because this rank cannot continue."""

    @abstractmethod
    def close(self) -> None:
        """Shut the backend down; all ranks call it together."""

    def rendezvous_info(self) -> bytes:
        """Return what rank 0 broadcasts to all ranks before `reinit`: nothing if the ranks stay connected."""
        return b""

    @abstractmethod
    def reinit(self, hosts: Sequence[int], info: bytes) -> Ranks | None:
        """Restart the backend among the first `len(hosts)` ranks; with the hosts of all ranks, among all of them.

        Args:
            hosts: a number for the host of each of these ranks.
            info: rank 0's `rendezvous_info`.

        Returns:
            these ranks; None on the other ranks.
        """

    def subset(self, count: int) -> RankSubset | None:
        """Return the first `count` ranks as separate ranks; None on the others. All ranks call it together.

        Until the subset is closed, and `wait_until_woken` has returned on the others, collectives over all
        ranks are not possible.

        Args:
            count: 1 to `size`.

        Raises:
            RunError: an idle rank cannot reach rank 0.
        """
        if not 1 <= count <= self.size:
            raise ValueError(f"a subset of {self.size} ranks has 1 to {self.size}, got {count}")
        hosts = self.hosts()
        if count == self.size:
            return RankSubset(self, self, hosts, None)
        connection = self._connect(hosts, count)
        info = self.broadcast_bytes(self.rendezvous_info() if self.rank == 0 else b"", "subset.rendezvous")
        formed = self.reinit(hosts[:count], info)
        if formed is not None:
            return RankSubset(self, formed, hosts, connection if isinstance(connection, WakeupServer) else None)
        if isinstance(connection, WakeupClient):
            self._idle = connection, hosts
        return None

    def wait_until_woken(self, stop_requested: Callable[[], bool]) -> None:
        """Sleep until the subset is closed, then rejoin the other ranks. Ranks outside the subset call it.

        It uses less than 1 % of a core, and returns within a fraction of a second after the subset is closed.

        Args:
            stop_requested: whether this rank should stop; see `RankSubset.stop_requested_elsewhere`.

        Raises:
            RunError: rank 0 has ended.
        """
        if self._idle is None:
            raise ValueError("this rank has nothing to wait for: no subset is training without it")
        (connection, hosts), self._idle = self._idle, None
        self.reinit(hosts, connection.wait(stop_requested))

    def use_gpus(self, *, shared: bool) -> None:  # noqa: B027  # by default there is nothing to prepare
        """Prepare to sum CUDA tensors; all ranks call it together, outside subsets.

        Args:
            shared: whether several ranks use one GPU; only if `shares_gpus`.
        """

    def nccl_version(self) -> str:
        """Return the version of NCCL that sums CUDA tensors: by default the one that torch uses."""
        return ".".join(map(str, torch.cuda.nccl.version()))

    def hosts(self) -> list[int]:
        """Return a number for the host of each rank, equal for ranks of one host. All ranks call it together."""
        return self.all_gather([_own_host()], "hosts").flatten().tolist()

    def on_one_host(self) -> bool:
        """Return whether all ranks are on one host. All ranks call it together."""
        return self.all_equal(_own_host(), "one host")

    def _connect(self, hosts: Sequence[int], count: int) -> WakeupServer | WakeupClient | None:
        """Connect rank 0 to each rank from `count` on; return this rank's side of it, None between them."""
        on_one_host = len(set(hosts)) == 1
        server = WakeupServer(on_one_host=on_one_host) if self.rank == 0 else None
        host, port, token = self.broadcast_address(server.port if server else 0, "wakeup", on_one_host=on_one_host)
        if server:
            server.accept(self.size - count, token.encode())
        return server or (WakeupClient(host, port, token.encode()) if self.rank >= count else None)

    def broadcast_address(self, port: int, name: str, *, on_one_host: bool) -> tuple[str, int, str]:
        """Return the host and port where rank 0 listens, and a token that identifies its ranks; equal on all."""
        host = "127.0.0.1" if on_one_host else socket.gethostname()
        address = self.broadcast_bytes(f"{host} {port} {secrets.token_hex(16)}".encode(), name)
        host, number, token = address.decode().split()
        return host, int(number), token

    def all_reduce(self, tensor: Tensor, name: str) -> Tensor:
        """All-reduce (sum) a tensor in place, and return it."""
        self.wait(self.start_all_reduce(tensor, name))
        return tensor

    def all_gather(self, numbers: Sequence[int], name: str) -> Tensor:
        """Return the numbers of each rank, int64 (R, n). All ranks call it together, with equally many numbers."""
        table = torch.zeros(self.size, len(numbers), dtype=torch.int64)
        table[self.rank] = torch.tensor(numbers, dtype=torch.int64)
        return self.all_reduce(table, name)

    def any(self, *, flag: bool) -> bool:
        """Return whether the flag is set on any rank; equal on all."""
        return bool(self.all_reduce(torch.tensor([float(flag)]), "any").item() > 0)

    def all_equal(self, number: int, name: str) -> bool:
        """Return whether a number of 32 bits, 0 to 2³² - 1, is equal on all ranks, by an all-reduce of 32 bytes.

        R Σ x² = (Σ x)² if and only if all x are equal (Cauchy-Schwarz). x is half of the number, so that the sums of
        squares are below 2⁶³.
        """
        halves = (number & 0xFFFF, number >> 16)
        sums = self.all_reduce(torch.tensor([*halves, *(half * half for half in halves)]), name).tolist()
        return all(self.size * squares == total * total for total, squares in zip(sums[:2], sums[2:], strict=True))

    def broadcast_bytes(self, data: bytes, name: str) -> bytes:
        """Return rank 0's `data` on every rank; the argument is ignored elsewhere."""
        length = torch.tensor([len(data)])
        self.broadcast(length, f"{name}.length")
        # int64, because some backends do not support uint8.
        words = torch.zeros(-(-int(length) // 8), dtype=torch.int64)
        if self.rank == 0 and data:
            padded = bytearray(data) + bytes(words.numel() * 8 - len(data))
            words = torch.frombuffer(padded, dtype=torch.int64).clone()
        self.broadcast(words, name)
        return words.numpy().tobytes()[: int(length)]

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """Return every rank's `data`, in the order of the ranks, on all ranks."""
        lengths = self.all_gather([len(data)], f"{name}.lengths").flatten().tolist()
        padded = data.ljust(8 * (max(lengths) // 8 + 1), b"\0")
        rows = self.all_gather(memoryview(padded).cast("q").tolist(), name)  # int64: some backends lack uint8
        return [row.numpy().tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]

    def stop_requested_elsewhere(self) -> bool:
        """Return whether an idle rank requests a stop, or the set of ranks is about to change; does not block."""
        return False

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Call a function on every rank, and fail on all ranks if it fails on any.

        Thus no rank waits forever for a rank that has failed, and the error is reported once.

        Raises:
            CollectiveError: on every rank, if `action` raised JobError or RunError on any.
        """
        error: JobError | RunError | None = None
        code = 0
        try:
            result = action()
        except (JobError, RunError) as raised:
            error = raised
            code = ExitCode.BAD_JOB if isinstance(raised, JobError) else ExitCode.FAILURE
        # One number, whatever the number of ranks. Only after a failure do the ranks find out which one failed.
        if self.all_reduce(torch.tensor([int(code > 0)]), "failures").item():
            codes = self.all_gather([code], "failures.codes").flatten()
            first = int(codes.nonzero()[0])
            raise CollectiveError(error if first == self.rank else None, ExitCode(int(codes[first])))
        return result

    def run_on_rank0(self, action: Callable[[], T]) -> T | None:
        """Call a function on rank 0 only; return its result there, and None elsewhere. Raises as `run_on_all`."""
        return self.run_on_all(lambda: action() if self.rank == 0 else None)

    def broadcast_from_rank0(self, produce: Callable[[], bytes], name: str) -> bytes:
        """Call `produce` on rank 0, and return its result on every rank. Raises as `run_on_all`."""
        return self.broadcast_bytes(self.run_on_rank0(produce) or b"", name)


def _own_host() -> int:
    return zlib.crc32(socket.gethostname().encode())


def version_text(number: int) -> str:
    """Return "2.27.7" for 22707, as NCCL counts from 2.9 and cuDNN from 9."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


class RanksLost(Exception):  # noqa: N818  # what happened
    """Ranks of an elastic job have left during a collective."""


class CollectiveError(Exception):
    """Raised on all ranks when one of them has failed with a JobError or RunError."""

    def __init__(self, error: JobError | RunError | None, code: ExitCode) -> None:
        super().__init__(str(error or ""))
        self.error = error
        """The failure, on the one rank that reports it; None on all others."""
        self.code = code


class RankSubset(Ranks):
    """The first ranks of a job while the others are idle, as `Ranks.subset` returns them.

    Args:
        whole: all ranks.
        formed: the backend's object for these ranks.
        hosts: a number for the host of each of all ranks.
        wakeup: rank 0's connections to the idle ranks; None elsewhere.
    """

    def __init__(self, whole: Ranks, formed: Ranks, hosts: Sequence[int], wakeup: WakeupServer | None) -> None:
        self._whole, self._formed, self._all_hosts, self._wakeup = whole, formed, hosts, wakeup
        self.backend, self.sums_on_gpu, self.sum_types = whole.backend, whole.sums_on_gpu, whole.sum_types
        self.rank, self.size = formed.rank, formed.size
        self.local_rank, self.local_size = formed.local_rank, formed.local_size

    def start_all_reduce(self, tensor: Tensor, name: str) -> Any:
        """Start an all-reduce (sum) over these ranks."""
        return self._formed.start_all_reduce(tensor, name)

    def wait(self, handle: Any) -> None:
        """Block until an all-reduce has finished."""
        self._formed.wait(handle)

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor with rank 0's on these ranks."""
        self._formed.broadcast(tensor, name)

    def abort(self, code: int) -> None:
        """End all ranks, including the idle ones."""
        self._whole.abort(code)

    def stop_requested_elsewhere(self) -> bool:
        """Return whether an idle rank has requested a stop; always False on ranks other than 0. Does not block.

        Raises:
            RunError: an idle rank has ended.
        """
        return self._wakeup is not None and self._wakeup.stop_requested()

    def close(self) -> None:
        """Wake the idle ranks and restart the backend among all ranks."""
        # The idle ranks are woken only after every rank of the subset has finished its work.
        self.all_reduce(torch.zeros(1), "subset.close")
        if self._formed is self._whole:
            return
        info = self.broadcast_bytes(self._whole.rendezvous_info() if self.rank == 0 else b"", "whole.rendezvous")
        if self._wakeup:
            self._wakeup.wake(info)
        self._whole.reinit(self._all_hosts, info)

    def rendezvous_info(self) -> bytes:
        """Return what rank 0 broadcasts before `reinit` makes a subset of this subset."""
        return self._formed.rendezvous_info()

    def reinit(self, hosts: Sequence[int], info: bytes) -> Ranks | None:
        """Make a subset of this subset."""
        return self._formed.reinit(hosts, info)


class SingleRank(Ranks):
    """A job of one process: every collective is a no-op."""

    backend = "single"
    rank, size, local_rank, local_size = 0, 1, 0, 1
    sums_on_gpu = True
    sum_types = (torch.float16, torch.bfloat16)

    def start_all_reduce(self, tensor: Tensor, name: str) -> None:
        """Do nothing: the tensor is the sum."""

    def wait(self, handle: None) -> None:
        """Do nothing."""

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Do nothing: the tensor is rank 0's."""

    def abort(self, code: int) -> None:
        """End this process."""
        os._exit(code)

    def close(self) -> None:
        """Do nothing."""

    def reinit(self, hosts: Sequence[int], info: bytes) -> SingleRank:
        """Return this rank: its only subset is itself."""
        return self
