"""The watchdog of a single rank; tests/launch/test_stall.py tests several ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.train.liveness.watchdog import WAITING, Heartbeat, Watchdog


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
