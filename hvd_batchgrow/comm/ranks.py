"""Ranks: what the trainer needs of the other processes of its job."""

from __future__ import annotations

import os
import secrets
import socket
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvd_batchgrow.comm.int64_words import from_words, to_words
from hvd_batchgrow.comm.wakeup import WakeupClient, WakeupServer
from hvd_batchgrow.messages.errors import ExitCode, JobError, RunError

T = TypeVar("T")

_SENT_AS_THEY_ARE = (torch.float32, torch.float64, torch.int64)


@dataclass(frozen=True)
class HostTopology:
    """Where a rank is among some ranks, which may lie on several hosts."""

    local_rank: int
    local_size: int
    cross_rank: int
    """How many hosts before this one have a rank of this local rank."""
    cross_size: int

    @classmethod
    def among(cls, hosts: Sequence[int], rank: int) -> HostTopology:
        """Of a rank, from the host of each."""
        on_this = [other for other, host in enumerate(hosts) if host == hosts[rank]]
        local_rank = on_this.index(rank)
        across = [host for host in dict.fromkeys(hosts) if hosts.count(host) > local_rank]
        return cls(local_rank, len(on_this), across.index(hosts[rank]), len(across))


class Ranks(ABC):
    """The processes that train together.

    Every operation is named: operations of one name meet each other on all ranks, in whatever order
    a rank starts them.
    """

    backend: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    """Ranks on this host."""
    sums_on_gpu: bool
    """Whether `start_sum` takes CUDA tensors."""
    sum_types: tuple[torch.dtype, ...]
    """Of 16 bits, what `start_sum` takes beside float32, float64 and int64."""
    elastic = False
    """Whether ranks may come and go."""
    _waiting: tuple[WakeupClient, list[int]] | None = None
    """While a part trains without this rank: its line to rank 0, and the hosts of all."""

    @abstractmethod
    def start_sum(self, tensor: Tensor, name: str) -> Any:
        """Start summing a contiguous tensor over all ranks, in place; returns what `wait` takes."""

    @abstractmethod
    def wait(self, handle: Any) -> None:
        """Block until the sum that `handle` belongs to is in its tensor."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite a contiguous tensor by rank 0's."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """End all ranks at once, because this one cannot go on."""

    @abstractmethod
    def close(self) -> None:
        """Leave in good order; all ranks do so together."""

    @abstractmethod
    def rendezvous_info(self) -> bytes:
        """What rank 0 tells all before `form`."""

    @abstractmethod
    def reinit(self, hosts: Sequence[int], prepared: bytes) -> Ranks | None:
        """Let the first ranks talk among themselves; or all again, after that.

        Args:
            hosts: a number for the host of each of them.
            prepared: rank 0's `prepare`.

        Returns:
            these ranks; None on ranks that are not among them.
        """

    def subset(self, count: int) -> RankSubset | None:
        """The first `count` ranks as ranks of their own; None on the others. All ranks call it together.

        From here on nothing may be asked of all ranks, until the part is closed on its own and
        `wait_until_woken` has returned on the others.

        Args:
            count: 1 to all of them.

        Raises:
            RunError: a rank that is to wait cannot reach rank 0.
        """
        if not 1 <= count <= self.size:
            raise ValueError(f"a part of {self.size} ranks has 1 to {self.size}, got {count}")
        hosts = self.hosts()
        if count == self.size:
            return RankSubset(self, self, hosts, None)
        line = self._connect(hosts, count)
        prepared = self.broadcast_bytes(self.rendezvous_info() if self.rank == 0 else None, "part.prepared") or b""
        formed = self.reinit(hosts[:count], prepared)
        if formed is not None:
            return RankSubset(self, formed, hosts, line if isinstance(line, WakeupServer) else None)
        if isinstance(line, WakeupClient):
            self._waiting = line, hosts
        return None

    def wait_until_woken(self, stop_requested: Callable[[], bool]) -> None:
        """On ranks outside the part: sleep until it is closed, and join the others again.

        Takes less than 1 % of a core and ends within a fraction of a second; if rank 0 ends, too.

        Args:
            stop_requested: whether this rank is asked to stop; see `RankSubset.stop_requested_elsewhere`.

        Raises:
            RunError: rank 0 has ended.
        """
        if self._waiting is None:
            raise ValueError("this rank is in the part, or there is none: it has nothing to wait for")
        (line, hosts), self._waiting = self._waiting, None
        self.reinit(hosts, line.wait(stop_requested))

    def hosts(self) -> list[int]:
        """A number for the host of each rank, the same for ranks of one host; all ranks call it together."""
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = zlib.crc32(socket.gethostname().encode())
        return [int(number) for number in self.sum(numbers, "hosts")]

    def _connect(self, hosts: Sequence[int], count: int) -> WakeupServer | WakeupClient | None:
        """A line from rank 0 to each rank but the first `count`: this rank's end of it, if it has one."""
        on_one_host = len(set(hosts)) == 1
        bell = WakeupServer(on_one_host=on_one_host) if self.rank == 0 else None
        host, port, token = self.tell_address(bell.port if bell else 0, "part.bell", on_one_host=on_one_host)
        if bell:
            bell.gather(self.size - count, token.encode())
        return bell or (WakeupClient(host, port, token.encode()) if self.rank >= count else None)

    def tell_address(self, port: int, name: str, *, on_one_host: bool) -> tuple[str, int, str]:
        """Host and port where rank 0 listens, and a token by which it knows its ranks; the same on all."""
        host = "127.0.0.1" if on_one_host else socket.gethostname()
        told = self.broadcast_bytes(f"{host} {port} {secrets.token_hex(16)}".encode(), name) or b""
        host, number, token = told.decode().split()
        return host, int(number), token

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """Sum over all ranks, in place."""
        self.wait(self.start_sum(tensor, name))
        return tensor

    def any(self, *, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all."""
        return bool(self.sum(torch.tensor([float(flag)]), "any").item() > 0)

    def broadcast_bytes(self, data: bytes | None, name: str) -> bytes | None:
        """What rank 0 has, on every rank; what others pass is not looked at."""
        length = torch.tensor([-1 if data is None else len(data)])
        self.broadcast(length, f"{name}.length")
        if length.item() < 0:
            return None
        # Words of 8 bytes: not every backend knows uint8.
        words = torch.zeros(-(-int(length) // 8), dtype=torch.int64)
        if self.rank == 0 and data:
            padded = bytearray(data) + bytes(words.numel() * 8 - len(data))
            words = torch.frombuffer(padded, dtype=torch.int64).clone()
        self.broadcast(words, name)
        return words.numpy().tobytes()[: int(length)]

    def broadcast_values(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor of any type and memory layout by rank 0's."""
        values = tensor.detach()
        if values.dtype in _SENT_AS_THEY_ARE:
            dense = values.contiguous()
            self.broadcast(dense, name)
            if dense.data_ptr() != values.data_ptr():
                values.copy_(dense)
        else:
            words = to_words(values)
            self.broadcast(words, name)
            values.copy_(from_words(words, values))

    def run_on_all(self, attempt: Callable[[], T]) -> T:
        """Do something on every rank that may fail on some, and go on only if it failed on none.

        So that no rank waits for ever for one that has given up, and a fault is told once.

        Raises:
            CollectiveError: on every rank, if `attempt` raised JobError or RunError on any.
        """
        error: JobError | RunError | None = None
        codes = torch.zeros(self.size, dtype=torch.int64)
        try:
            result = attempt()
        except (JobError, RunError) as raised:
            error = raised
            codes[self.rank] = ExitCode.BAD_JOB if isinstance(raised, JobError) else ExitCode.FAILURE
        failed = self.sum(codes, "together").nonzero().flatten().tolist()
        if failed:
            first = failed[0]
            raise CollectiveError(error if first == self.rank else None, ExitCode(int(codes[first])))
        return result

    def broadcast_from_rank0(self, produce: Callable[[], bytes | None], name: str) -> bytes | None:
        """What `produce` gives on rank 0, on every rank. Raises as `run_on_all`."""
        return self.broadcast_bytes(self.run_on_all(lambda: produce() if self.rank == 0 else None), name)


class RanksLost(Exception):  # noqa: N818  # what happened
    """Some of the ranks of an elastic job have gone while something was asked of all."""


class CollectiveError(Exception):  # not an error of its own: it carries one
    """Raised on all ranks when one of them has failed in a way that the user can mend."""

    def __init__(self, error: JobError | RunError | None, code: ExitCode) -> None:
        super().__init__(str(error or ""))
        self.error = error
        """What to tell the user; None on all ranks but the one that tells it."""
        self.code = code


class RankSubset(Ranks):
    """The first ranks of a job, while the others wait: what `Ranks.first` gives.

    Args:
        whole: all ranks.
        formed: these ranks, as the backend knows them.
        hosts: of all ranks.
        bell: wakes those that wait; on rank 0.
    """

    def __init__(self, whole: Ranks, formed: Ranks, hosts: Sequence[int], bell: WakeupServer | None) -> None:
        self._whole, self._formed, self._all_hosts, self._bell = whole, formed, hosts, bell
        self.backend, self.sums_on_gpu, self.sum_types = whole.backend, whole.sums_on_gpu, whole.sum_types
        self.rank, self.size = formed.rank, formed.size
        self.local_rank, self.local_size = formed.local_rank, formed.local_size

    def start_sum(self, tensor: Tensor, name: str) -> Any:
        """Over these ranks."""
        return self._formed.start_sum(tensor, name)

    def wait(self, handle: Any) -> None:
        """Block until a sum is there."""
        self._formed.wait(handle)

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """To these ranks."""
        self._formed.broadcast(tensor, name)

    def abort(self, code: int) -> None:
        """End all ranks, those that wait too."""
        self._whole.abort(code)

    def stop_requested_elsewhere(self) -> bool:
        """Whether a rank that waits is asked to stop, as far as rank 0 knows; returns at once, False on others.

        Raises:
            RunError: a rank that waited is gone.
        """
        return self._bell is not None and self._bell.hear()

    def close(self) -> None:
        """Wake the others and join them: all ranks can talk again as before."""
        # Nobody is woken while one of these ranks still works.
        self.sum(torch.zeros(1), "part.close")
        if self._formed is self._whole:
            return
        prepared = (
            self.broadcast_bytes(self._whole.rendezvous_info() if self.rank == 0 else None, "whole.prepared") or b""
        )
        if self._bell:
            self._bell.ring(prepared)
        self._whole.reinit(self._all_hosts, prepared)

    def rendezvous_info(self) -> bytes:
        """A part of a part is prepared as it is."""
        return self._formed.rendezvous_info()

    def reinit(self, hosts: Sequence[int], prepared: bytes) -> Ranks | None:
        """A part of a part."""
        return self._formed.reinit(hosts, prepared)


class SingleRank(Ranks):
    """A job of one process: every sum is there already."""

    backend = "single"
    rank, size, local_rank, local_size = 0, 1, 0, 1
    sums_on_gpu = True
    sum_types = (torch.float16, torch.bfloat16)

    def start_sum(self, tensor: Tensor, name: str) -> None:
        """Nothing to add."""

    def wait(self, handle: None) -> None:
        """Nothing to wait for."""

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Rank 0's tensor is this one."""

    def abort(self, code: int) -> None:
        """End this process."""
        os._exit(code)

    def close(self) -> None:
        """Nothing to leave."""

    def rendezvous_info(self) -> bytes:
        """Nothing to tell."""
        return b""

    def reinit(self, hosts: Sequence[int], prepared: bytes) -> SingleRank:
        """Its part is itself."""
        return self
