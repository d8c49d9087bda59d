"""The line between rank 0 and ranks that wait; ranks are threads here."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvd_batchgrow.comm.wakeup import WakeupClient, WakeupServer
from hvd_batchgrow.messages.errors import RunError

TOKEN = b"0123456789abcdef"


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def connect(count: int) -> tuple[WakeupServer, list[WakeupClient]]:
    bell = WakeupServer(on_one_host=True)
    lines = [WakeupClient("127.0.0.1", bell.port, TOKEN) for _ in range(count)]
    bell.gather(count, TOKEN)
    return bell, lines


def hear_until(bell: WakeupServer, deadline: float) -> None:
    while not bell.hear() and time.monotonic() < deadline:
        time.sleep(0.01)


def never() -> bool:
    return False


def test_the_bell_wakes_all_with_what_rank_0_tells(threads: ThreadPoolExecutor) -> None:
    bell, lines = connect(3)
    waiting = [threads.submit(line.wait, never) for line in lines]
    assert not bell.hear()
    message = bytes(range(256)) * 100
    bell.ring(message)
    assert [future.result(timeout=10) for future in waiting] == [message] * 3


def test_a_request_is_heard_once_made_and_remembered(threads: ThreadPoolExecutor) -> None:
    bell, lines = connect(2)
    asked = threading.Event()
    waiting = [threads.submit(lines[0].wait, never), threads.submit(lines[1].wait, asked.is_set)]
    assert not bell.hear()
    asked.set()
    hear_until(bell, time.monotonic() + 10)
    assert bell.hear()
    bell.ring(b"")
    assert [future.result(timeout=10) for future in waiting] == [b""] * 2


def test_a_request_that_comes_as_the_bell_rings_takes_nothing_back(threads: ThreadPoolExecutor) -> None:
    bell, (line,) = connect(1)
    line._line.sendall(b"!")  # unread when the bell's end closes
    ringing = threads.submit(bell.ring, b"told")
    assert line.wait(never) == b"told"
    ringing.result(timeout=10)


def test_who_waits_ends_when_rank_0_does(threads: ThreadPoolExecutor) -> None:
    bell, (line,) = connect(1)
    waiting = threads.submit(line.wait, lambda: True)  # its request may fail, too
    for end in bell._lines:
        end.close()
    begin = time.monotonic()
    with pytest.raises(RunError, match="rank 0 has ended while this rank waited"):
        waiting.result(timeout=10)
    assert time.monotonic() - begin < 5


def test_rank_0_learns_that_one_who_waited_is_gone() -> None:
    bell, (first, second) = connect(2)
    first._line.close()
    with pytest.raises(RunError, match="a rank that waited for its phase is gone"):
        hear_until(bell, time.monotonic() + 10)
    second._line.close()
    for line in bell._lines:
        line.close()


def test_a_stranger_is_sent_away() -> None:
    bell = WakeupServer(on_one_host=True)
    with socket.create_connection(("127.0.0.1", bell.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        line = WakeupClient("127.0.0.1", bell.port, TOKEN)
        bell.gather(1, TOKEN)
        assert stranger.recv(1) == b""
    line._line.close()
    for end in bell._lines:
        end.close()


def test_a_rank_0_that_cannot_be_reached_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(RunError, match=f"rank 0 cannot be reached at 127.0.0.1, port {port}: .*refused"):
        WakeupClient("127.0.0.1", port, TOKEN)
