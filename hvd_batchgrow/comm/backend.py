"""Connect the ranks that a launcher has started, over the requested backend."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress

from hvd_batchgrow.comm.devices import DeviceKey, agree_on_devices, why_not_on_gpus
from hvd_batchgrow.comm.launcher_env import (
    TORCHRUN,
    Backend,
    is_elastic,
    launched_by,
    launched_ranks,
    unconnected_tasks,
)
from hvd_batchgrow.comm.ranks import CollectiveError, Ranks, SingleRank
from hvd_batchgrow.messages.errors import RunError


def connect(backend: Backend = "auto", device: DeviceKey = "auto", ranks_per_gpu: int | None = None) -> Ranks:
    """Join the ranks that a launcher started together with this one.

    If the script or a framework has already called `torch.distributed.init_process_group`, the ranks are those of that
    call, unless `backend` is "horovod".

    Args:
        backend: library for the collectives; "auto" is Horovod, or torch.distributed under torchrun, without Horovod,
            or if Horovod cannot sum on the GPUs.
        device: `layout.device` of the job to train.
        ranks_per_gpu: `layout.ranks_per_gpu` of that job.

    Raises:
        RunError: no backend is available for several ranks, or the ranks do not find each other.
    """
    if backend != "horovod" and _torch_is_initialized():
        from hvd_batchgrow.comm.torch_distributed import join_initialized

        return join_initialized()
    launcher = launched_by(os.environ)
    if tasks := unconnected_tasks(os.environ):
        raise RunError(
            f"srun has started {tasks} tasks without an MPI plugin: each would train the whole job alone.\n"
            "  Use srun --mpi=pmix (srun --mpi=list shows the available plugins), or mpirun inside the allocation"
        )
    if launcher is None:
        return SingleRank()
    rank, size = launched_ranks(os.environ)
    ranks: Ranks | None
    if backend == "torch" or (backend == "auto" and launcher == TORCHRUN):
        ranks = _torch_ranks()
    elif launcher == TORCHRUN:
        raise RunError(
            "Horovod cannot join ranks that torchrun started: use --backend torch, or start the ranks with mpirun"
        )
    else:
        ranks = _horovod_ranks(backend, launcher, rank, size)
    if ranks.size != size and not ranks.elastic:
        mpirun = shutil.which("mpirun") or "no mpirun on PATH"
        raise RunError(
            f"{launcher} has started {size} ranks, but {ranks.backend} sees {ranks.size}: each would train alone.\n"
            f"  Horovod must be built with the MPI of the launcher ({mpirun}). "
            "Under srun, use the plugin of that MPI: --mpi=pmix for Open MPI"
        )
    return _for_devices(ranks, device, ranks_per_gpu) if backend == "auto" and not ranks.elastic else ranks


def _torch_is_initialized() -> bool:
    """Return whether the script has initialized torch.distributed, without the second that importing it takes."""
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    return c10d is not None and c10d.is_initialized()


def _for_devices(ranks: Ranks, device: DeviceKey, ranks_per_gpu: int | None) -> Ranks:
    """Return the ranks, or the same ones over torch.distributed if these cannot sum on the GPUs that they will use."""
    with suppress(CollectiveError):  # training reports it
        if why := why_not_on_gpus(ranks, agree_on_devices(ranks, device, ranks_per_gpu)):
            if ranks.rank == 0:
                print(f"{why}: using torch.distributed instead", file=sys.stderr)
            ranks.close()
            return _torch_ranks()
    return ranks


def _horovod_ranks(backend: Backend, launcher: str, rank: int, size: int) -> Ranks:
    try:
        from hvd_batchgrow.comm.horovod import HorovodRanks
    except ImportError as error:
        if size == 1:
            return SingleRank()
        if backend == "auto":
            if rank == 0:
                print(f"Horovod cannot be imported ({error}): using torch.distributed instead", file=sys.stderr)
            return _torch_ranks()
        raise RunError(
            f"started by {launcher} as one of {size} ranks, but Horovod cannot be imported ({error}).\n"
            "  Build it from source with tools/setup.sh; if a wheel of it is available: "
            "pip install 'hvd_batchgrow[horovod]'.\n"
            "  Or use --backend torch, which does not need it; or train with one rank: hvd-batchgrow train JOB, "
            "without a launcher"
        ) from None
    if is_elastic(os.environ):
        from hvd_batchgrow.comm.elastic import ElasticRanks

        return ElasticRanks()
    return HorovodRanks()


def _torch_ranks() -> Ranks:
    # Imported only if used: importing torch.distributed takes a second.
    from hvd_batchgrow.comm.torch_distributed import join

    return join()
