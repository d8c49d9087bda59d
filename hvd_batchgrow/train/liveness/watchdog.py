"""A watchdog that names a stalled rank and ends the job, so that the job does not hang."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from hvd_batchgrow.comm.launcher_env import RELAY_S
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.messages.errors import ExitCode
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.train.liveness.self_kill_timer import SelfKillTimer

WAITING = "waiting for the other ranks"
IDLE = "waiting for its phase"
REPORT_SHARE = 0.1
"""A stall is reported after this share of the timeout."""
_ABORT_GRACE_S = 10.0
_MOST_PER_S = 500.0
"""Most datagrams that rank 0 receives in a second, unless the timeout requires more."""
_GOLDEN_RATIO = 0.618034
"""Its multiples modulo 1 are evenly spread, also for consecutive ranks."""
_MOST_NAMED = 8
"""Most ranks that a message names."""
_POLL_S = 0.05
"""How often the watchdog checks whether the run has ended; a run waits at most this long for its watchdog."""


def send_interval_s(size: int, timeout_s: float) -> float:
    """Return the seconds between two datagrams of a rank to rank 0.

    They are a hundredth of the timeout, at most 1 s. With more than `_MOST_PER_S` ranks, each one sends less often, but
    at least three times before a stall is reported.

    Args:
        size: number of ranks.
        timeout_s: the job ends after this time without progress.
    """
    return max(check_interval_s(timeout_s), min((size - 1) / _MOST_PER_S, timeout_s * REPORT_SHARE / 3))


def check_interval_s(timeout_s: float) -> float:
    """Return the seconds between two checks of a rank's own progress."""
    return min(1.0, timeout_s * REPORT_SHARE / 10)


class Heartbeat:
    """The current stage of this rank's training thread, which the thread sets at each step."""

    def __init__(self) -> None:
        self.state = (0, "starting")

    def at(self, stage: str) -> None:
        """Enter a stage; entering the same stage again counts as progress."""
        self.state = (self.state[0] + 1, stage)


@dataclass
class _PeerState:
    """The last message received from a rank."""

    at_s: float
    stage: str = "starting"
    host: str = "an unknown host"
    ever: bool = False
    """Whether any message was received."""


class Watchdog:
    """Watches a job, in a thread of each rank, while entered; all ranks enter it together.

    All ranks take part in every update, so if this rank's training thread makes progress, no rank has stalled. If
    it makes none, datagrams show the culprit: every rank sends its stage to rank 0, which answers with its own. The
    culprit is a silent rank, or else a rank that does not wait for others. If datagrams are lost, a message may name
    the wrong rank, but the job does not end. Time counts only while this process runs, so a job that is suspended as
    a whole (by Slurm, for instance) has not stalled.

    An elastic job continues without a stalled rank. At the timeout, only that rank ends, by itself or, if it does not
    run, by the kernel. The other ranks end only if the job makes no progress for as long again.

    Args:
        ranks: of the job.
        heartbeat: the stage of this rank.
        timeout_s: the job ends after this time without progress.
    """

    def __init__(self, ranks: Ranks, heartbeat: Heartbeat, timeout_s: float) -> None:
        self._ranks, self._heartbeat, self._timeout_s = ranks, heartbeat, timeout_s
        self._interval_s, self._send_interval_s = check_interval_s(timeout_s), send_interval_s(ranks.size, timeout_s)
        self._next_send_s = self._send_interval_s * ranks.rank / ranks.size - self._interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._socket: socket.socket | None = None
        self._token = ""
        self._clock_s = 0.0
        others = range(1, ranks.size) if ranks.rank == 0 else range(min(1, ranks.size - 1))
        self._peers = {rank: _PeerState(0.0) for rank in others}
        self._last: tuple[int, float] = (-1, 0.0)
        self._reported_count = -1
        self._self_kill = SelfKillTimer() if ranks.elastic else None

    def __enter__(self) -> Watchdog:
        if self._ranks.size > 1:
            self._connect()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._self_kill:
            self._self_kill.close()
        if self._socket:
            self._socket.close()

    def _connect(self) -> None:
        on_one_host = self._ranks.on_one_host()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        if self._ranks.rank == 0:
            self._socket.bind(("127.0.0.1" if on_one_host else "", 0))
        own = self._socket.getsockname()[1]
        host, port, self._token = self._ranks.broadcast_address(own, "watchdog", on_one_host=on_one_host)
        if self._ranks.rank:
            with contextlib.suppress(OSError):  # then rank 0 counts this rank as silent
                self._socket.connect((host, port))

    def _run(self) -> None:
        # The ranks take turns within an interval: rank 0's socket has room for a few hundred datagrams only.
        self._ended.wait(self._interval_s * (self._ranks.rank * _GOLDEN_RATIO % 1))
        last_s = time.monotonic()
        while not self._ended.wait(0 if self._socket else self._interval_s):
            if self._self_kill:
                self._self_kill.set(self._timeout_s)
            self._exchange()
            now_s = time.monotonic()
            self._clock_s += min(now_s - last_s, 2 * self._interval_s)
            last_s = now_s
            self._check()

    def _exchange(self) -> None:
        """Send this rank's stage, and receive messages for an interval."""
        if self._socket is None:
            return
        if self._ranks.rank and self._is_due_to_send():
            self._send_stage(self._socket.send)
        deadline = time.monotonic() + self._interval_s
        while (left_s := deadline - time.monotonic()) > 0 and not self._ended.is_set():
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            if poll.poll(1e3 * min(left_s, _POLL_S)):
                self._receive(self._socket)

    def _is_due_to_send(self) -> bool:
        """Return whether it is this rank's turn to send, and set the time of its next turn."""
        if self._clock_s < self._next_send_s:
            return False
        self._next_send_s = self._clock_s + self._send_interval_s - self._interval_s / 2
        return True

    def _receive(self, line: socket.socket) -> None:
        try:
            data, address = line.recvfrom(4096)
            message = json.loads(data)
            if message["token"] != self._token:
                return
            self._peers[int(message["rank"])] = _PeerState(
                self._clock_s, str(message["stage"]), str(message["host"]), ever=True
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            self._ended.wait(0.01)  # if the peer has ended, the kernel reports an error immediately each time
            return
        if self._ranks.rank == 0:
            self._send_stage(lambda data: line.sendto(data, address))

    def _send_stage(self, send: Callable[[bytes], Any]) -> None:
        stage, host = self._heartbeat.state[1], socket.gethostname()
        message = {"token": self._token, "rank": self._ranks.rank, "stage": stage, "host": host}
        with contextlib.suppress(OSError):
            send(dump_json(message).encode())

    def _check(self) -> None:
        count, stage = self._heartbeat.state
        if count != self._last[0]:
            self._last = count, self._clock_s
        stalled_s = self._clock_s - self._last[1]
        if self._ranks.rank and not self._ranks.elastic:
            stalled_s = self._stall_without_rank_0_s(stalled_s, stage)
        timeout_s = self._timeout_s
        if stalled_s > timeout_s * REPORT_SHARE and self._reported_count != count:
            self._reported_count = count
            end = "the attempt ends" if self._ranks.restarts else "the job ends"
            what = "the stalled rank ends" if self._ranks.elastic else end
            self._report(f"no progress for {stalled_s:.1f} s ({what} at {timeout_s:g} s): {self._culprits(stage)}")
        if stalled_s > self._limit_s(stage):
            self._report(f"no progress for {timeout_s:g} s, logging.stall_timeout_s; ending: {self._culprits(stage)}")
            self._end()

    def _limit_s(self, stage: str) -> float:
        """Return how long this rank waits for progress before it ends."""
        others_stall = stage == WAITING or any(self._silent())
        return self._timeout_s * (2 if self._ranks.elastic and others_stall else 1)

    def _stall_without_rank_0_s(self, stalled_s: float, stage: str) -> float:
        """Return how long this rank has made no progress and not heard from rank 0; for ranks other than 0."""
        silent_s = self._clock_s - self._peers[0].at_s
        if stage == IDLE:
            return silent_s if self._peers[0].ever else 0.0
        # Rank 0 reports stalls and ends the job. If it still has not after twice the timeout, this rank does.
        return stalled_s if stalled_s > 2 * self._timeout_s else min(silent_s, stalled_s)

    def _culprits(self, stage: str) -> str:
        """Describe the silent ranks; else the ranks that do not wait for others; else all."""
        size = self._ranks.size
        silent = [
            f"rank {rank} of {size} on {peer.host} has been silent for {self._clock_s - peer.at_s:.1f} s "
            f"(stopped, or its host is down); its last stage: {peer.stage}"
            for rank, peer in self._silent()
        ]
        if silent:
            return listed(silent, _MOST_NAMED, separator="; ")
        stages = {rank: (peer.stage, peer.host) for rank, peer in self._peers.items()}
        stages[self._ranks.rank] = stage, socket.gethostname()
        busy = {rank: place for rank, place in stages.items() if place[0] not in {WAITING, IDLE}} or stages
        texts = [f"rank {rank} of {size} on {host} is {what}" for rank, (what, host) in sorted(busy.items())]
        return listed(texts, _MOST_NAMED, separator="; ")

    def _silent(self) -> list[tuple[int, _PeerState]]:
        """Return the ranks that have not sent a message for 5 checks, or for 2.5 send intervals if that is longer."""
        latest_s = self._clock_s - max(5 * self._interval_s, 2.5 * self._send_interval_s)
        return [(rank, peer) for rank, peer in sorted(self._peers.items()) if peer.at_s < latest_s]

    def _report(self, text: str) -> None:
        print(f"rank {self._ranks.rank}: {text}", file=sys.stderr, flush=True)

    def _end(self) -> None:
        # MPI's abort may wait for a lock that a hanging thread holds.
        timer = threading.Timer(_ABORT_GRACE_S, os._exit, [int(ExitCode.FAILURE)])
        timer.daemon = True
        timer.start()
        time.sleep(RELAY_S)
        self._ranks.abort(ExitCode.FAILURE)
