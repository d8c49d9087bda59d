"""Ranks: what the trainer needs of the other processes of its job."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvd_batchgrow.comm.launch import launched_by, launched_ranks, lone_tasks
from hvd_batchgrow.errors import ExitCode, JobError, RunError

T = TypeVar("T")


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

    def together(self, attempt: Callable[[], T]) -> T:
        """Do something on every rank that may fail on some, and go on only if it failed on none.

        So that no rank waits for ever for one that has given up, and a fault is told once.

        Raises:
            AgreedFailure: on every rank, if `attempt` raised JobError or RunError on any.
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
            raise AgreedFailure(error if first == self.rank else None, ExitCode(int(codes[first])))
        return result

    def from_rank0(self, produce: Callable[[], bytes | None], name: str) -> bytes | None:
        """What `produce` gives on rank 0, on every rank. Raises as `together`."""
        return self.broadcast_bytes(self.together(lambda: produce() if self.rank == 0 else None), name)


class AgreedFailure(Exception):  # noqa: N818  # not an error of its own: it carries one
    """Raised on all ranks when one of them has failed in a way that the user can mend."""

    def __init__(self, error: JobError | RunError | None, code: ExitCode) -> None:
        super().__init__(str(error or ""))
        self.error = error
        """What to tell the user; None on all ranks but the one that tells it."""
        self.code = code


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


def connect() -> Ranks:
    """Join the ranks that a launcher started together with this one.

    Raises:
        RunError: there are others, but no Horovod to talk to them, or it does not find them.
    """
    launcher = launched_by(os.environ)
    if tasks := lone_tasks(os.environ):
        raise RunError(
            f"srun has started {tasks} tasks without an MPI plugin: each would train the whole job alone.\n"
            "  Say srun --mpi=pmix (srun --mpi=list shows what there is), or use mpirun inside the allocation"
        )
    if launcher is None:
        return SingleRank()
    _, size = launched_ranks(os.environ)
    try:
        from hvd_batchgrow.comm.horovod import HorovodRanks
    except ImportError as error:
        if size == 1:
            return SingleRank()
        raise RunError(
            f"started by {launcher} as one of {size} ranks, but Horovod cannot be imported ({error}).\n"
            "  Build it from its sources: tools/setup.sh; or, where there is a wheel of it: "
            "pip install 'hvd_batchgrow[horovod]'.\n"
            "  Or train with one rank: hvd-batchgrow train JOB, without a launcher"
        ) from None
    ranks = HorovodRanks()
    if ranks.size != size:
        mpirun = shutil.which("mpirun") or "no mpirun on PATH"
        raise RunError(
            f"{launcher} has started {size} ranks, and Horovod sees {ranks.size}: each would train alone.\n"
            f"  Is the launcher ({mpirun}) of the MPI that Horovod was built with? "
            "Under srun, is the plugin that MPI's: --mpi=pmix for Open MPI?"
        )
    return ranks
