"""The watchdog of a single rank; tests/launch/test_stall.py tests several ranks."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.train.liveness.watchdog import WAITING, Heartbeat, Watchdog, send_interval_s


class Listening(SingleRank):
    """Records the exit code of `abort`, and continues."""

    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.code = 0

    def abort(self, code: int) -> None:
        self.code = code
        self.aborted.set()


@pytest.fixture(autouse=True)
def _no_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_batchgrow.train.liveness.watchdog._ABORT_GRACE_S", 600.0)


@pytest.mark.slow
def test_a_rank_that_stalls_is_reported_and_then_ended(capsys: pytest.CaptureFixture[str]) -> None:
    ranks, pulse = Listening(), Heartbeat()
    pulse.at("reading samples")
    begin = time.monotonic()
    with Watchdog(ranks, pulse, 0.5):
        assert ranks.aborted.wait(30)
    assert time.monotonic() - begin >= 0.5
    assert ranks.code == 1
    report, end = capsys.readouterr().err.splitlines()[:2]
    assert report.startswith("rank 0: no progress for 0.")
    assert report.endswith("s (the job ends at 0.5 s): rank 0 of 1 on " + end.rpartition(" on ")[2])
    assert "no progress for 0.5 s, logging.stall_timeout_s; ending: rank 0 of 1 on " in end
    assert end.endswith("is reading samples")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reading samples", WAITING])
def test_an_elastic_rank_ends_at_the_timeout_and_at_twice_the_timeout_if_it_waits(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timers = []

    class FakeTimer:
        """Records its settings, and never kills the process."""

        def set(self, after_s: float) -> None:
            timers.append(after_s)

        def close(self) -> None:
            timers.append(0)

    monkeypatch.setattr("hvd_batchgrow.train.liveness.watchdog.SelfKillTimer", FakeTimer)
    ranks, pulse = Listening(), Heartbeat()
    ranks.elastic = True
    pulse.at(stage)
    begin = time.monotonic()
    with Watchdog(ranks, pulse, 1.0):
        assert ranks.aborted.wait(30)
    assert time.monotonic() - begin >= (2 if stage == WAITING else 1)
    assert "(the stalled rank ends at 1 s): rank 0 of 1 on " in capsys.readouterr().err
    assert set(timers[:-1]) == {1.0}, "the kernel's timer is set repeatedly"
    assert timers[-1] == 0


@pytest.mark.parametrize("close", [False, True])
def test_the_kernel_kills_a_process_that_is_stopped(close: bool) -> None:
    code = (
        "import os, signal, time; from hvd_batchgrow.train.liveness.self_kill_timer import SelfKillTimer;"
        "timer = SelfKillTimer();"
        f"timer.set(600); timer.set({2.0 if close else 0.5}); {'timer.close();' if close else ''} print(flush=True);"
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        if close:
            time.sleep(2.5)
            process.send_signal(signal.SIGCONT)
        assert process.wait(30) == (0 if close else -signal.SIGKILL)


@pytest.mark.parametrize("pause_s", [1.9, 2.1])
def test_slow_progress_is_not_reported(pause_s: float, capsys: pytest.CaptureFixture[str]) -> None:
    ranks, pulse = Listening(), Heartbeat()
    watchdog = Watchdog(ranks, pulse, 20.0)  # not entered: this test is its clock
    for _ in range(30):
        pulse.at("computing gradients")  # entering the same stage again is progress too
        watchdog._check()
        watchdog._clock_s += pause_s
        watchdog._check()
    assert not ranks.aborted.is_set()
    num_reports = len(capsys.readouterr().err.splitlines())
    assert num_reports == (0 if pause_s < 2 else 30)  # a tenth of the timeout


class Crowd(SingleRank):
    """One of many ranks."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("size", "per_s"), [(2, 1), (400, 399), (1000, 500), (10_000, 500)])
def test_rank_0_receives_at_most_500_datagrams_a_second(size: int, per_s: int) -> None:
    """Every rank's turns, played check by check for 45 s at the default timeout."""
    watchdogs = [Watchdog(Crowd(rank, size), Heartbeat(), 600.0) for rank in range(1, size)]
    sent = []
    for now_s in range(45):
        for watchdog in watchdogs:
            watchdog._clock_s = float(now_s)
        sent.append(sum(watchdog._is_due_to_send() for watchdog in watchdogs))
    assert sum(sent[25:]) / 20 == pytest.approx(per_s, rel=0.08)
    assert max(sent) <= 1.1 * per_s + 1


@pytest.mark.parametrize("size", [2, 1000, 10_000, 1_000_000])
@pytest.mark.parametrize("timeout_s", [1.0, 60.0, 600.0])
def test_a_silent_rank_is_known_before_a_stall_is_reported(size: int, timeout_s: float) -> None:
    """One lost datagram makes no rank silent, and a stopped rank is silent after a tenth of the timeout."""
    watchdog = Watchdog(Crowd(0, 2), Heartbeat(), timeout_s)
    watchdog._send_interval_s = send_interval_s(size, timeout_s)
    watchdog._clock_s = 1000.0 + 2 * watchdog._send_interval_s
    watchdog._peers[1].at_s = 1000.0
    assert not watchdog._silent()
    watchdog._clock_s = 1000.0 + timeout_s / 10
    assert [rank for rank, _ in watchdog._silent()] == [1]


@pytest.mark.parametrize("data", [b"", b"[" * 4000, b"{}", b"[]", b"\xff"])
def test_a_datagram_of_any_bytes_is_ignored(data: bytes) -> None:
    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, other:
        other.send(data)
        Watchdog(Crowd(1, 2), Heartbeat(), 600.0)._receive(ours)


def test_a_message_names_at_most_eight_ranks() -> None:
    watchdog = Watchdog(Crowd(0, 1000), Heartbeat(), 600.0)
    watchdog._clock_s = 100.0
    text = watchdog._culprits("waiting")
    assert text.startswith("rank 1 of 1000 on an unknown host has been silent for 100.0 s")
    assert text.endswith("; and 991 more")
    assert text.count("has been silent") == 8
