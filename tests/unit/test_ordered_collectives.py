"""Collectives of several ranks (threads here), for a backend that matches them by the order of issue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from hvd_batchgrow.comm.ordered_collectives import OrderedCollectives
from hvd_batchgrow.messages.errors import RunError

RANKS = 3


class Broadcasts:
    """Broadcasts of rank 0's keys to all ranks; they fail on the other ranks after `cut`."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.changed = threading.Condition()
        self.is_cut = False

    def of(self, rank: int) -> Callable[[int], int]:
        keys = self._from(rank)

        def broadcast_key(key: int) -> int:
            if rank == 0:
                with self.changed:
                    self.sent.append(key)
                    self.changed.notify_all()
            return next(keys)

        return broadcast_key

    def _from(self, rank: int) -> Iterator[int]:
        position = 0
        while True:
            with self.changed:
                self.changed.wait_for(lambda position=position: self.is_cut or len(self.sent) > position)
                if self.is_cut and rank:
                    raise RuntimeError("Connection closed by peer [127.0.0.1]\nmore of it")
                key = self.sent[position]
            yield key
            position += 1

    def cut(self) -> None:
        with self.changed:
            self.is_cut = True
            self.changed.notify_all()


class Work:
    def wait(self) -> None: ...


def issuing(into: list[str], name: str) -> Callable[[], Work]:
    def issue() -> Work:
        into.append(name)
        return Work()

    return issue


def test_every_rank_issues_in_rank_0s_order() -> None:
    broadcasts = Broadcasts()
    orders = [OrderedCollectives(rank, broadcasts.of(rank)) for rank in range(RANKS)]
    issued: list[list[str]] = [[] for _ in orders]
    names = [["c", "a", "b"], ["a", "b", "c"], ["b", "c", "a"]]
    for _ in range(20):
        operations = [
            order.start(name, issuing(into, name))
            for order, into, own in zip(orders, issued, names, strict=True)
            for name in own
        ]
        for operation in operations:
            operation.wait()
    assert issued == [["c", "a", "b"] * 20] * RANKS
    for order in orders:
        order.close()


def test_an_operation_is_not_issued_before_rank_0_has_started_it() -> None:
    broadcasts = Broadcasts()
    issued: list[str] = []
    second = OrderedCollectives(1, broadcasts.of(1))
    operation = second.start("a", issuing(issued, "a"))
    with pytest.raises(ValueError, match="a was started before"):
        second.start("a", issuing(issued, "a"))
    assert issued == []
    first = OrderedCollectives(0, broadcasts.of(0))
    first.start("a", issuing([], "a")).wait()
    operation.wait()
    assert issued == ["a"]
    for order in (first, second):
        order.close()


def test_a_lost_peer_fails_started_and_later_collectives_in_one_line() -> None:
    broadcasts = Broadcasts()
    order = OrderedCollectives(1, broadcasts.of(1))
    operation = order.start("a", issuing([], "a"))
    broadcasts.cut()
    message = r"^another rank has ended or cannot be reached any more \(Connection closed by peer \[127.0.0.1\]\)$"
    with pytest.raises(RunError, match=message):
        operation.wait()
    with pytest.raises(RunError, match=message):
        order.start("b", issuing([], "b"))


def test_wait_raises_the_error_of_the_backend() -> None:
    order = OrderedCollectives(0, Broadcasts().of(0))

    def refuse() -> Work:
        raise RuntimeError("no route to host")

    with pytest.raises(RunError, match="no route to host"):
        order.start("a", refuse).wait()
    order.close()
