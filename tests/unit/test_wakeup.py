"""The connections between rank 0 and idle ranks, with threads as ranks."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvd_batchgrow.comm.wakeup import WakeupClient, WakeupServer
from hvd_batchgrow.messages.errors import RunError

TOKEN = b"0123456789abcdef"
PATIENCE_S = 60.0
"""A wait that lasts longer counts as a hang."""


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def connect(count: int) -> tuple[WakeupServer, list[WakeupClient]]:
    server = WakeupServer(on_one_host=True)
    clients = [WakeupClient("127.0.0.1", server.port, TOKEN) for _ in range(count)]
    server.accept(count, TOKEN)
    return server, clients


def wait_for_stop_request(server: WakeupServer) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not server.stop_requested() and time.monotonic() < deadline:
        time.sleep(0.01)


def never() -> bool:
    return False


def test_wake_sends_the_message_to_every_client(threads: ThreadPoolExecutor) -> None:
    server, clients = connect(3)
    waiting = [threads.submit(client.wait, never) for client in clients]
    assert not server.stop_requested()
    message = bytes(range(256)) * 100
    server.wake(message)
    assert [future.result(PATIENCE_S) for future in waiting] == [message] * 3


def test_a_stop_request_reaches_the_server_and_is_remembered(threads: ThreadPoolExecutor) -> None:
    server, clients = connect(2)
    requested = threading.Event()
    waiting = [threads.submit(clients[0].wait, never), threads.submit(clients[1].wait, requested.is_set)]
    assert not server.stop_requested()
    requested.set()
    wait_for_stop_request(server)
    assert server.stop_requested()
    server.wake(b"")
    assert [future.result(PATIENCE_S) for future in waiting] == [b""] * 2


def test_an_unread_stop_request_does_not_lose_the_message(threads: ThreadPoolExecutor) -> None:
    server, (client,) = connect(1)
    client._connection.sendall(b"!")  # unread when the server closes its socket
    waking = threads.submit(server.wake, b"message")
    assert client.wait(never) == b"message"
    waking.result(PATIENCE_S)


def test_an_idle_rank_ends_when_rank_0_ends(threads: ThreadPoolExecutor) -> None:
    server, (client,) = connect(1)
    waiting = threads.submit(client.wait, lambda: True)  # sending the request may fail too
    for connection in server._connections:
        connection.close()
    with pytest.raises(RunError, match="rank 0 has ended while this rank waited"):
        waiting.result(PATIENCE_S)


def test_rank_0_fails_when_an_idle_rank_has_ended() -> None:
    server, (first, second) = connect(2)
    first._connection.close()
    with pytest.raises(RunError, match="an idle rank has ended while it waited for its phase"):
        wait_for_stop_request(server)
    second._connection.close()
    for connection in server._connections:
        connection.close()


def test_a_rank_that_does_not_connect_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_batchgrow.comm.wakeup.JOIN_TIMEOUT_S", 0.1)
    server = WakeupServer(on_one_host=True)
    client = WakeupClient("127.0.0.1", server.port, TOKEN)
    with pytest.raises(RunError, match=r"^timed out after 0.1 s: 1 of 2 idle ranks did not connect$"):
        server.accept(2, TOKEN)
    for connection in (client._connection, server._listener, *server._connections):
        connection.close()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n", b""])
def test_a_connection_without_the_token_is_closed(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr("hvd_batchgrow.comm.wakeup._TOKEN_TIMEOUT_S", 0.1)
    monkeypatch.setattr("hvd_batchgrow.comm.wakeup.JOIN_TIMEOUT_S", PATIENCE_S)
    server = WakeupServer(on_one_host=True)
    with socket.create_connection(("127.0.0.1", server.port)) as stranger:
        stranger.sendall(sent)
        client = WakeupClient("127.0.0.1", server.port, TOKEN)
        server.accept(1, TOKEN)
        assert stranger.recv(1) == b""
    client._connection.close()
    for connection in server._connections:
        connection.close()


class Unreachable(socket.socket):
    """A connection whose peer has no power."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        raise OSError(self.fault, os.strerror(self.fault))

    fault = 0


@pytest.mark.parametrize("fault", [errno.EHOSTUNREACH, errno.ETIMEDOUT])
def test_a_host_without_power_is_reported(monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    monkeypatch.setattr(Unreachable, "fault", fault)
    server, (client,) = connect(1)
    (connection,) = server._connections
    lost = Unreachable(fileno=connection.detach())
    server._connections = [lost]
    server._readable = selectors.DefaultSelector()
    server._readable.register(lost, selectors.EVENT_READ)
    client._connection.sendall(b"!")
    with pytest.raises(RunError, match="an idle rank has ended"):
        wait_for_stop_request(server)
    with pytest.raises(RunError, match="an idle rank has ended"):
        server.wake(b"")
    client._connection.close()
    lost.close()


def test_a_rank_that_does_not_answer_when_it_is_woken_is_reported() -> None:
    server, (client,) = connect(1)
    (connection,) = server._connections
    connection.settimeout(0.1)
    with pytest.raises(RunError, match="an idle rank has ended"):
        server.wake(b"")
    client._connection.close()
    connection.close()


def test_the_address_of_an_unreachable_rank_0_is_in_the_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(RunError, match=f"rank 0 cannot be reached at 127.0.0.1, port {port}: .*refused"):
        WakeupClient("127.0.0.1", port, TOKEN)
