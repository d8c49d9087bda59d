"""One rank of a large job in one process, which records what it sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hvd_batchgrow.comm.ranks import Ranks


@dataclass(frozen=True)
class Collective:
    """A collective that a rank took part in."""

    kind: Literal["all-reduce", "broadcast"]
    name: str
    num_bytes: int


@dataclass(frozen=True)
class Sent:
    """Messages and bytes that rank 0 sends; no other rank sends more."""

    messages: int
    num_bytes: int


class LoneRank(Ranks):
    """Rank 0 of `size`. The other ranks do not exist.

    In an all-gather and in the comparisons of weights and hosts they count as equal to rank 0, in other sums as zeros.
    """

    backend, collectives = "lone", "MPI"
    rank, local_rank, local_size = 0, 0, 1
    sums_on_gpu = False
    sum_types = ()

    def __init__(self, size: int) -> None:
        self.size = size
        self.log: list[Collective] = []

    def start_all_reduce(self, tensor: Tensor, name: str) -> None:
        """Record an all-reduce."""
        self.log.append(Collective("all-reduce", name, tensor.nbytes))
        if name in {"weights", "one host"}:
            tensor.mul_(self.size)
        elif tensor.ndim == 2 and len(tensor) == self.size:
            tensor[:] = tensor[0].clone()

    def wait(self, handle: Any) -> None:
        """Do nothing."""

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Record a broadcast."""
        self.log.append(Collective("broadcast", name, tensor.nbytes))

    def abort(self, code: int) -> None:
        """Fail."""
        raise AssertionError(f"abort({code})")

    def close(self) -> None:
        """Do nothing."""

    def reinit(self, hosts: Sequence[int], info: bytes) -> LoneRank | None:
        """Return itself."""
        return self


def sent_by_rank0(log: Sequence[Collective], size: int) -> Sent:
    """Return what rank 0 sends for these collectives.

    All-reduce: recursive halving and doubling, 2 ⌈log2 R⌉ messages and 2 (R - 1)/R n bytes. Broadcast: a binomial tree,
    whose root sends ⌈log2 R⌉ messages of n bytes. Source: Thakur, Rabenseifner & Gropp 2005, sections 4.2 and 4.5,
    doi:10.1177/1094342005051521.
    """
    steps = (size - 1).bit_length()
    sums = [one.num_bytes for one in log if one.kind == "all-reduce"]
    broadcasts = [one.num_bytes for one in log if one.kind == "broadcast"]
    num_bytes = 2 * (size - 1) / size * sum(sums) + steps * sum(broadcasts)
    return Sent(steps * (2 * len(sums) + len(broadcasts)), round(num_bytes))
