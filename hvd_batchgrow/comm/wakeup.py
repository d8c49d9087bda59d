"""A line from rank 0 to ranks that wait: it costs them no core, and asks neither MPI nor Horovod.

Horovod's threads of all ranks go round together, a thousand times a second, and MPI's wait is a
busy one: a rank that only belongs to them costs 13 % of a core under MPI and 28 % under Gloo.
A waiting rank sits in `select` on a socket instead.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Callable, Sequence

from hvd_batchgrow.messages.errors import RunError

JOIN_TIMEOUT_S = 120.0
_LOOK_S = 0.05
"""How often a waiting rank looks whether it is asked to stop."""
_LENGTH = struct.Struct("!I")
_STOP = b"!"
_GONE = "a rank that waited for its phase is gone"


class WakeupServer:
    """Rank 0's end: it rings once, and hears who asks to stop.

    Args:
        on_one_host: listen to this host alone.
    """

    def __init__(self, *, on_one_host: bool) -> None:
        self._listener = socket.create_server(("127.0.0.1" if on_one_host else "", 0), backlog=4096)
        self.port = int(self._listener.getsockname()[1])
        self._lines: list[socket.socket] = []
        self.stop_requested = False

    def gather(self, count: int, token: bytes) -> None:
        """Wait until `count` ranks have come; others, who do not know the token, are sent away.

        Raises:
            RunError: not all came in time.
        """
        self._listener.settimeout(JOIN_TIMEOUT_S)
        while len(self._lines) < count:
            try:
                line, _ = self._listener.accept()
                line.settimeout(JOIN_TIMEOUT_S)
                came = _receive(line, len(token))
            except TimeoutError:
                raise RunError(f"{count - len(self._lines)} of {count} ranks that are to wait did not come") from None
            if came != token:
                line.close()
                continue
            _keep_alive(line)
            self._lines.append(line)
        self._listener.close()

    def hear(self) -> bool:
        """Whether any waiting rank has asked to stop so far; returns at once.

        Raises:
            RunError: one of them is gone.
        """
        for line in _readable(self._lines, 0.0):
            if not _receive(line, len(_STOP)):
                raise RunError(_GONE)
            self.stop_requested = True
        return self.stop_requested

    def ring(self, message: bytes) -> None:
        """Wake all, and tell them something; they may use the line no more.

        Raises:
            RunError: one of them is gone.
        """
        for line in self._lines:
            try:
                line.sendall(_LENGTH.pack(len(message)) + message)
                line.shutdown(socket.SHUT_WR)
            except OSError:
                raise RunError(_GONE) from None
        for line in self._lines:
            # Closed with a request unread, a socket would take back what it has sent.
            while _receive(line, len(_STOP)):
                pass
            line.close()
        self._lines.clear()


class WakeupClient:
    """The end of a rank that waits.

    Raises:
        RunError: rank 0 cannot be reached.
    """

    def __init__(self, host: str, port: int, token: bytes) -> None:
        try:
            self._line = socket.create_connection((host, port), JOIN_TIMEOUT_S)
        except OSError as error:
            raise RunError(f"rank 0 cannot be reached at {host}, port {port}: {error}") from None
        self._line.sendall(token)
        self._line.settimeout(None)
        _keep_alive(self._line)

    def wait(self, stop_requested: Callable[[], bool]) -> bytes:
        """Sleep until the bell rings; returns what rank 0 tells.

        Args:
            stop_requested: whether this rank is asked to stop; if so, rank 0 is told, once.

        Raises:
            RunError: rank 0 has ended.
        """
        told = False
        while not _readable([self._line], _LOOK_S):
            if not told and stop_requested():
                told = True
                with contextlib.suppress(ConnectionError):  # what has become of rank 0, the next look tells
                    self._line.sendall(_STOP)
        length = _receive(self._line, _LENGTH.size)
        message = _receive(self._line, *_LENGTH.unpack(length)) if length else b""
        self._line.close()
        if not length:
            raise RunError("rank 0 has ended while this rank waited for its phase")
        return message


def _readable(lines: Sequence[socket.socket], timeout_s: float) -> list[socket.socket]:
    # Not select(): it takes no descriptor beyond 1023.
    poll = select.poll()
    for line in lines:
        poll.register(line, select.POLLIN)
    found = {descriptor for descriptor, _ in poll.poll(1e3 * timeout_s)}
    return [line for line in lines if line.fileno() in found]


def _receive(line: socket.socket, count: int) -> bytes:
    """So many bytes; none if the other end is gone."""
    data = b""
    try:
        while len(data) < count:
            part = line.recv(count - len(data))
            if not part:
                return b""
            data += part
    except ConnectionError:
        return b""
    return data


def _keep_alive(line: socket.socket) -> None:
    """A host that loses its power closes nothing: ask from time to time whether it is there."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
