"""Ranks over Horovod, with MPI or Gloo. Only this file and elastic.py import Horovod."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

from hvd_batchgrow.comm.launcher_env import GLOO, launched_by
from hvd_batchgrow.comm.ranks import HostTopology, Ranks, version_text
from hvd_batchgrow.messages.errors import RunError

# Gradients are all-reduced in a few large buckets. Fusing them would cost a copy. It would also make the order of
# additions, and so the last bits of a sum over three or more ranks, depend on timing.
os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
# Horovod's thread waits inside MPI on the core of a training thread: spinning there reduced the throughput of
# two ranks on two cores by a third.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")

if launched_by(os.environ) != GLOO:
    with contextlib.suppress(ImportError):
        # Imported before Horovod, so that mpi4py finalises MPI and hvd.shutdown() does not.
        from mpi4py import MPI

import horovod.torch as hvd
import torch
from horovod.runner.http.http_server import OK, KVStoreHandler, RendezvousHTTPServer
from torch import Tensor

_SERVERS: list[RendezvousHTTPServer] = []
"""Rank 0's rendezvous servers under Gloo: the current one, and the previous one, which a slow rank may still use."""


class _KeepAddresses(KVStoreHandler):  # type: ignore[misc]  # Horovod has no types
    """Ignores deletions: a rank deletes its address once it is connected, but other ranks may still need it."""

    def do_DELETE(self) -> None:  # noqa: N802  # its name in http.server
        self.send_status_code(OK)


class HorovodRanks(Ranks):
    """All ranks that mpirun or horovodrun started, or the first of them.

    Horovod is shut down and restarted among the ranks that work in a phase, which takes 0.01 s under MPI and
    0.2 s under Gloo. A process set would not do: Horovod's threads on all ranks synchronize whatever the set,
    which costs idle ranks 13 % of a core under MPI and 28 % under Gloo.

    Args:
        count: number of ranks; None: all.
    """

    sum_types = (torch.float16,)  # Horovod 0.28.1 does not support bfloat16

    def __init__(self, count: int | None = None) -> None:
        hvd.init(list(range(count or 0)))
        self.under_mpi = bool(hvd.mpi_enabled())
        self.backend = "horovod-mpi" if self.under_mpi else "horovod-gloo"
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.sums_on_gpu = bool(hvd.nccl_built())
        self.collectives = "MPI" if self.under_mpi else "Gloo"

    def use_gpus(self, *, shared: bool) -> None:
        """Note that NCCL sums CUDA tensors, as this Horovod is built; `sums_on_gpu` must be set."""
        self.collectives = "NCCL"

    def nccl_version(self) -> str:
        """Return the version of NCCL that Horovod is built with."""
        return version_text(hvd.nccl_built())

    def start_all_reduce(self, tensor: Tensor, name: str) -> Any:
        """Start an all-reduce in place. Raises Horovod's error when a peer is lost."""
        return hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)

    def wait(self, handle: Any) -> None:
        """Block until an all-reduce has finished."""
        hvd.synchronize(handle)

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor with rank 0's."""
        with torch.no_grad():
            hvd.broadcast_(tensor, 0, name=name)

    def abort(self, code: int) -> None:
        """End all ranks: MPI kills them, or horovodrun does because this process fails."""
        if self.under_mpi and "MPI" in globals():
            MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    def close(self) -> None:
        """Shut Horovod down once all ranks have finished.

        horovodrun ends all ranks when one ends with an exit code other than 0, and rank 0 may still be writing.
        """
        self.all_reduce(torch.zeros(1), "close")
        hvd.shutdown()
        _stop_servers(keep=0)

    def rendezvous_info(self) -> bytes:
        """Start a rendezvous server under Gloo, and return its address; horovodrun's own knows the old ranks only."""
        if self.under_mpi:
            return b""
        _stop_servers(keep=1)
        _SERVERS.append(RendezvousHTTPServer(("", 0), _KeepAddresses, 0))
        # Stopping the server takes up to one polling interval.
        threading.Thread(target=_SERVERS[-1].serve_forever, args=(0.05,), daemon=True).start()
        return f"{socket.gethostname()} {_SERVERS[-1].server_port}".encode()

    def reinit(self, hosts: Sequence[int], info: bytes) -> HorovodRanks | None:
        """Shut Horovod down, and restart it among these ranks.

        Raises:
            RunError: mpi4py is missing under MPI, so that MPI would end with Horovod.
        """
        if self.under_mpi and "MPI" not in globals():
            raise RunError(
                "under MPI, phases that use only some of the ranks need mpi4py: pip install 'hvd_batchgrow[mpi]'"
            )
        hvd.shutdown()
        if self.rank >= len(hosts):
            return None
        if info:
            os.environ.update(_gloo_environment(hosts, self.rank, *info.decode().split()))
        return HorovodRanks(len(hosts) if self.under_mpi else None)


def _stop_servers(keep: int) -> None:
    while len(_SERVERS) > keep:
        server = _SERVERS.pop(0)
        server.shutdown()
        server.server_close()


def _gloo_environment(hosts: Sequence[int], rank: int, address: str, port: str) -> dict[str, str]:
    """Return the variables that horovodrun would set for a rank of these."""
    place = HostTopology.among(hosts, rank)
    numbers = {
        "RANK": rank,
        "SIZE": len(hosts),
        "LOCAL_RANK": place.local_rank,
        "LOCAL_SIZE": place.local_size,
        "CROSS_RANK": place.cross_rank,
        "CROSS_SIZE": place.cross_size,
    }
    # Horovod's client needs an IP address: it does not resolve host names.
    address = socket.gethostbyname(address) if len(set(hosts)) > 1 else "127.0.0.1"
    rendezvous = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": address, "HOROVOD_GLOO_RENDEZVOUS_PORT": port}
    return {f"HOROVOD_{name}": str(number) for name, number in numbers.items()} | rendezvous
