"""Ranks through Horovod, under MPI or Gloo: with elastic.py, all that imports it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

from hvd_batchgrow.comm.launcher_env import GLOO, launched_by
from hvd_batchgrow.comm.ranks import HostTopology, Ranks
from hvd_batchgrow.messages.errors import RunError

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
from horovod.runner.http.http_server import OK, KVStoreHandler, RendezvousHTTPServer
from torch import Tensor

_SERVERS: list[RendezvousHTTPServer] = []
"""Rank 0's, under Gloo: the newest, at which ranks meet, and the one before, from which the last may still leave."""


class _Addresses(KVStoreHandler):  # type: ignore[misc]  # Horovod has no types
    """Keeps what ranks tell of themselves: one that has met all deletes its own, though others may yet ask for it."""

    def do_DELETE(self) -> None:  # noqa: N802  # its name in http.server
        self.send_status_code(OK)


class HorovodRanks(Ranks):
    """All ranks that mpirun or horovodrun started, or the first of them.

    Ranks that a phase does without are not left out by a process set: Horovod's threads of all ranks
    go round together whatever the set, which costs those that wait 13 % of a core under MPI and
    28 % under Gloo. Horovod is shut down, and started again among those that work, in 0.01 s under
    MPI and 0.2 s under Gloo.

    Args:
        count: how many; None: all.
    """

    sum_types = (torch.float16,)  # Horovod 0.28.1 knows no bfloat16

    def __init__(self, count: int | None = None) -> None:
        hvd.init(list(range(count or 0)))
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
        _stop_servers(keep=0)

    def rendezvous_info(self) -> bytes:
        """Under Gloo where to meet: not at horovodrun's own server, which still knows the ranks of before."""
        if self.under_mpi:
            return b""
        _stop_servers(keep=1)
        _SERVERS.append(RendezvousHTTPServer(("", 0), _Addresses, 0))
        # Stopping one takes as long as it sleeps between looks.
        threading.Thread(target=_SERVERS[-1].serve_forever, args=(0.05,), daemon=True).start()
        return f"{socket.gethostname()} {_SERVERS[-1].server_port}".encode()

    def reinit(self, hosts: Sequence[int], prepared: bytes) -> HorovodRanks | None:
        """Shut Horovod down, and start it among these ranks.

        Raises:
            RunError: without mpi4py MPI ends with Horovod.
        """
        if self.under_mpi and "MPI" not in globals():
            raise RunError("phases on some of the ranks need mpi4py, under MPI: pip install 'hvd_batchgrow[mpi]'")
        hvd.shutdown()
        if self.rank >= len(hosts):
            return None
        if prepared:
            os.environ.update(_gloo_environment(hosts, self.rank, *prepared.decode().split()))
        return HorovodRanks(len(hosts) if self.under_mpi else None)


def _stop_servers(keep: int) -> None:
    while len(_SERVERS) > keep:
        server = _SERVERS.pop(0)
        server.shutdown()
        server.server_close()


def _gloo_environment(hosts: Sequence[int], rank: int, address: str, port: str) -> dict[str, str]:
    """What horovodrun tells a rank, for these ranks."""
    place = HostTopology.among(hosts, rank)
    numbers = {
        "RANK": rank,
        "SIZE": len(hosts),
        "LOCAL_RANK": place.local_rank,
        "LOCAL_SIZE": place.local_size,
        "CROSS_RANK": place.cross_rank,
        "CROSS_SIZE": place.cross_size,
    }
    # Horovod's client wants an address: names it does not look up.
    address = socket.gethostbyname(address) if len(set(hosts)) > 1 else "127.0.0.1"
    meeting = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": address, "HOROVOD_GLOO_RENDEZVOUS_PORT": port}
    return {f"HOROVOD_{name}": str(number) for name, number in numbers.items()} | meeting
