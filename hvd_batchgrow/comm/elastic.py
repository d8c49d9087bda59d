"""Ranks that join and leave while a job runs, under `horovodrun --min-np … --host-discovery-script …`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
from horovod.common.elastic import notification_manager
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from hvd_batchgrow.comm.horovod import HorovodRanks
from hvd_batchgrow.comm.ranks import RanksLost


class ElasticRanks(HorovodRanks):
    """The current ranks. They stop when hosts have joined or left, and `reform` joins the new set of ranks."""

    elastic = True

    def __init__(self) -> None:
        super().__init__()
        self._changed = False
        notification_manager.init()
        notification_manager.register_listener(self)

    def on_hosts_updated(self, timestamp: int, result: Any) -> None:
        """Note that hosts have joined or left. Horovod calls it in its own thread, on rank 0 only."""
        self._changed = True

    def stop_requested_elsewhere(self) -> bool:
        """Return whether this rank knows that hosts have joined or left since the ranks were formed."""
        return self._changed

    def start_all_reduce(self, tensor: Tensor, name: str) -> Any:
        """Start an all-reduce in place. Raises RanksLost."""
        with _lost_ranks():
            return super().start_all_reduce(tensor, name)

    def wait(self, handle: Any) -> None:
        """Block until an all-reduce has finished. Raises RanksLost."""
        with _lost_ranks():
            super().wait(handle)

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor with rank 0's. Raises RanksLost."""
        with _lost_ranks():
            super().broadcast(tensor, name)

    def reform(self) -> None:
        """Join the ranks that are available now; a rank whose host has been removed ends here.

        Blocks until horovodrun has at least `--min-np` ranks.
        """
        hvd.shutdown()
        self._changed = False
        HorovodRanks.__init__(self)

    def abort(self, code: int) -> None:
        """End this rank; the others continue without it."""
        os._exit(code)


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """Raise RanksLost where Horovod reports an internal error."""
    try:
        yield
    except HorovodInternalError as error:
        raise RanksLost(str(error)) from error
