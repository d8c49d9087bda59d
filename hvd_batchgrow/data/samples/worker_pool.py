"""Processes that draw samples ahead of training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import torch
import torch.multiprocessing  # tensors then travel between processes in shared memory

from hvd_batchgrow.comm.launcher_env import LAUNCHER_PREFIXES
from hvd_batchgrow.data.samples.keyed_samples import Drawn, Failed, KeyedSamples, Request
from hvd_batchgrow.import_string import find_callable
from hvd_batchgrow.messages.errors import RunError, describe_error

_GRACE_S = 5.0
"""Time within which a worker must end before it is killed."""
_STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP}
"""Signals that a launcher or a terminal sends to all processes. Workers ignore them: the rank finishes its update."""


class WorkerPool:
    """Processes that draw samples, each with a copy of the datasets. They start with the first request.

    They are spawned: a process forked after MPI, CUDA or threads have started may hang. They end when the pool is
    closed or deleted, and when this process ends or is killed.

    Args:
        samples: must be picklable.
        count: number of processes.
    """

    def __init__(self, samples: KeyedSamples, count: int) -> None:
        self.count = count
        self._source = samples.source
        self._context = _RecordingContext()
        arguments: Any = (_Setting(samples.source), samples)
        self._executor = ProcessPoolExecutor(count, self._context, initializer=_begin, initargs=arguments)

    def draw(self, requests: Iterator[Request]) -> Iterator[Drawn | Failed]:
        """Yield the results of requests, in order. Two requests per worker are in progress.

        Raises:
            RunError: the datasets cannot be sent to the workers, or a worker has ended.
        """
        waiting: deque[Future[Drawn | Failed]] = deque()
        try:
            for request in requests:
                waiting.append(self._submit(request))
                if len(waiting) > 2 * self.count:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the workers; one that is still busy after a few seconds is killed."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + _GRACE_S
        for process in self._context.processes:
            if not wait([process.sentinel], max(0.0, end - time.monotonic())):
                process.kill()
                wait([process.sentinel])

    def _submit(self, request: Request) -> Future[Drawn | Failed]:
        # The first requests start the workers, which inherit the blocked signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            return self._executor.submit(_draw, request)
        except BrokenProcessPool:
            raise self._ended() from None
        except Exception as error:  # of pickling the user's objects
            raise RunError(
                f"data.source = {self._source!r} cannot be sent to the {self.count} processes of data.workers: "
                f"{describe_error(error)}; define its classes and functions at the top level of their module and open "
                "files in __getitem__, or set data.workers = 0"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _result(self, future: Future[Drawn | Failed]) -> Drawn | Failed:
        try:
            return future.result()
        except BrokenProcessPool:
            raise self._ended() from None

    def _ended(self) -> RunError:
        return RunError(
            f"a process of data.workers = {self.count} ended while it drew samples of {self._source!r}; its message is "
            "above, if it wrote one. Often memory is short, or /dev/shm is too small: use fewer workers"
        )


class _RecordingContext(SpawnContext):
    """Spawns processes, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        process = SpawnProcess(*args, **kwargs)
        self.processes.append(process)
        return process


# --- in a worker -------------------------------------------------------------------------------

_of_this_worker: list[KeyedSamples] = []


class _Setting:
    """Prepares a worker when it is unpickled, which is before the datasets: their modules may need the preparation."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return _prepare, (self._source, os.getcwd())


def _prepare(source: str, folder: str) -> None:
    """Prepare this process: it is not a rank, uses one core, and finds the user's modules."""
    for name in [name for name in os.environ if name.startswith(LAUNCHER_PREFIXES)]:
        del os.environ[name]
    torch.set_num_threads(1)
    os.chdir(folder)
    find_callable(source)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _begin(_setting: None, samples: KeyedSamples) -> None:
    _of_this_worker.append(samples)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _draw(request: Request) -> Drawn | Failed:
    return _of_this_worker[0].draw(request)
