"""Ranks that come and go while a job runs, under `horovodrun --min-np … --host-discovery-script …`."""

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
    """The ranks of the moment. `changed` says that there could be others, `reform` joins those."""

    elastic = True

    def __init__(self) -> None:
        super().__init__()
        self._changed = False
        notification_manager.init()
        notification_manager.register_listener(self)

    def on_hosts_updated(self, timestamp: int, result: Any) -> None:
        """Called by Horovod in a thread of its own, on rank 0 alone: there are other hosts now."""
        self._changed = True

    @property
    def changed(self) -> bool:
        """Whether hosts have come or gone since the ranks were formed, as far as this one knows."""
        return self._changed

    def start_sum(self, tensor: Tensor, name: str) -> Any:
        """Start summing in place. Raises RanksLost."""
        with _losses():
            return super().start_sum(tensor, name)

    def wait(self, handle: Any) -> None:
        """Block until a sum is there. Raises RanksLost."""
        with _losses():
            super().wait(handle)

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite by rank 0's. Raises RanksLost."""
        with _losses():
            super().broadcast(tensor, name)

    def reform(self) -> None:
        """Join those that are there now; a rank whose host is no longer among them ends here.

        Blocks until horovodrun has as many as it wants at least.
        """
        hvd.shutdown()
        self._changed = False
        HorovodRanks.__init__(self)

    def abort(self, code: int) -> None:
        """End this rank; the others go on without it."""
        os._exit(code)


@contextmanager
def _losses() -> Iterator[None]:
    try:
        yield
    except HorovodInternalError as error:
        raise RanksLost(str(error)) from error
