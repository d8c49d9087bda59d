"""One order of operations on all ranks, for a backend that matches them by order and not by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from hashlib import blake2b
from queue import SimpleQueue
from typing import Any

from hvd_batchgrow.messages.errors import RunError

_END = 0


class Operation:
    """One that this rank has started; it is issued when its turn comes.

    Args:
        issue: hands it to the backend, and returns what has a `wait()`.
    """

    def __init__(self, issue: Callable[[], Any]) -> None:
        self._issue = issue
        self._issued = threading.Event()
        self._work: Any = None
        self._fault: Exception | None = None

    def run(self) -> None:
        """Issue it."""
        try:
            self._work = self._issue()
        except RuntimeError as error:
            self._fault = error
        self._issued.set()

    def fail(self, fault: Exception) -> None:
        """Its turn will never come."""
        self._fault = fault
        self._issued.set()

    def wait(self) -> None:
        """Block until it is done. Raises RunError when another rank is lost."""
        self._issued.wait()
        if self._fault:
            raise lost(self._fault)
        try:
            self._work.wait()
        except RuntimeError as error:
            raise lost(error) from None


class IssueOrder:
    """Issues operations in the order in which rank 0 starts them.

    Hooks of a backward start the sums of gradients, and a rank may come to them in another order than
    its peers: where it has no group in a pass, or its threads take another turn. So rank 0 tells which
    operation is next, a number of 8 bytes made of its name, and every rank issues that one as soon as
    it has started it. A thread of this rank does so, while the backward goes on.

    Args:
        rank: of this process.
        tell: gives rank 0's argument on all ranks; called by this thread alone.
    """

    def __init__(self, rank: int, tell: Callable[[int], int]) -> None:
        self._rank, self._tell = rank, tell
        self._next: SimpleQueue[int] = SimpleQueue()
        self._started: dict[int, Operation] = {}
        self._changed = threading.Condition()
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="issue order", daemon=True)
        self._thread.start()

    def start(self, name: str, issue: Callable[[], Any]) -> Operation:
        """Have an operation issued in its turn.

        Args:
            name: the same on all ranks.
            issue: see `Operation`.

        Raises:
            RunError: another rank is lost.
        """
        key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), signed=True)
        operation = Operation(issue)
        with self._changed:
            if self._fault:
                raise lost(self._fault)
            if key in self._started:
                raise ValueError(f"{name} was started before, and has not been issued yet")
            self._started[key] = operation
            self._changed.notify()
        if self._rank == 0:
            self._next.put(key)
        return operation

    def close(self) -> None:
        """End the thread; all ranks do so, with no operation under way."""
        self._next.put(_END)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (key := self._tell(self._next.get() if self._rank == 0 else _END)) != _END:
                self._take(key).run()
        except RuntimeError as error:
            self._fail_all(error)

    def _take(self, key: int) -> Operation:
        with self._changed:
            self._changed.wait_for(lambda: key in self._started)
            return self._started.pop(key)

    def _fail_all(self, fault: Exception) -> None:
        with self._changed:
            self._fault = fault
            for operation in self._started.values():
                operation.fail(fault)


def lost(fault: Exception) -> RunError:
    """What to tell the user when the backend has lost a peer."""
    first_line = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
    return RunError(f"another rank has ended or cannot be reached any more ({first_line})")
