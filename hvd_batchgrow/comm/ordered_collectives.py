"""A single order of collectives on all ranks, for backends that match collectives by order instead of by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from hashlib import blake2b
from queue import SimpleQueue
from typing import Any

from hvd_batchgrow.messages.errors import RunError

_END = 0


class Operation:
    """A collective that this rank has started, and that is issued when its turn comes.

    Args:
        issue: passes it to the backend, and returns a handle with a `wait()` method.
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
        """Make `wait` raise, because the operation cannot be issued any more."""
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


class OrderedCollectives:
    """Issues collectives in the order in which rank 0 starts them.

    Hooks start the all-reduces of gradients during the backward pass. The order can differ between ranks, for
    instance because a rank has no ghost batch in a micro-batch, or because its threads are scheduled differently.
    So rank 0 broadcasts which collective comes next, as an 8-byte hash of its name. Every rank issues that
    collective as soon as it has started it. A background thread does this while the backward pass continues.

    Args:
        rank: of this process.
        broadcast_key: returns rank 0's argument on all ranks; only the background thread calls it.
    """

    def __init__(self, rank: int, broadcast_key: Callable[[int], int]) -> None:
        self._rank, self._broadcast_key = rank, broadcast_key
        self._next: SimpleQueue[int] = SimpleQueue()
        self._started: dict[int, Operation] = {}
        self._changed = threading.Condition()
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ordered collectives", daemon=True)
        self._thread.start()

    def start(self, name: str, issue: Callable[[], Any]) -> Operation:
        """Start a collective, to be issued in its turn.

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
        """End the thread. All ranks call it together, with no collective in progress."""
        self._next.put(_END)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (key := self._broadcast_key(self._next.get() if self._rank == 0 else _END)) != _END:
                self._wait_until_started(key).run()
        except RuntimeError as error:
            self._fail_all(error)

    def _wait_until_started(self, key: int) -> Operation:
        with self._changed:
            self._changed.wait_for(lambda: key in self._started)
            return self._started.pop(key)

    def _fail_all(self, fault: Exception) -> None:
        with self._changed:
            self._fault = fault
            for operation in self._started.values():
                operation.fail(fault)


def lost(fault: Exception) -> RunError:
    """Return the error to raise when the backend reports that a peer is lost."""
    first_line = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
    return RunError(f"another rank has ended or cannot be reached any more ({first_line})")
