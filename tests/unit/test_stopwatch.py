"""The stopwatch of a device, by a device whose host only queues work."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.metric_window import MetricWindow
from hvd_batchgrow.train.update import stopwatch as module
from hvd_batchgrow.train.update.stopwatch import STAGES, HostEvent, Stage, Stopwatch, stopwatch_of
from tests.helpers import NUM_TRAIN, small_job
from tests.training import make_trainer


class FakeDevice:
    """A host and the stream of a device, with the times at which each is done with what it has started."""

    def __init__(self) -> None:
        self.host = self.stream = 0.0
        self.num_events = self.num_waits = 0

    def launch(self, seconds: float) -> None:
        self.stream = max(self.host, self.stream) + seconds

    def make_event(self) -> FakeEvent:
        self.num_events += 1
        return FakeEvent(self)


class FakeEvent:
    """As `torch.cuda.Event`: an event passes when the work queued before it is done, and can be read then."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.at = device, 0.0

    def record(self, stream: object) -> None:
        assert stream == "stream"
        self.at = max(self.device.host, self.device.stream)

    def synchronize(self) -> None:
        self.device.num_waits += 1
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end_event: FakeEvent, /) -> float:
        assert end_event.at <= self.device.host, "device not ready"
        return 1e3 * (end_event.at - self.at)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def watch(device: FakeDevice) -> Stopwatch:
    return Stopwatch(device.make_event, lambda: "stream")


def update(device: FakeDevice, watch: Stopwatch, *, all_reduce_s: float, blocks_host: bool) -> None:
    """Two passes of 3 s forward and 5 s backward; the all-reduce starts 1 s before the last backward ends."""
    watch.begin("forward")
    for fetch_s in (2.0, 20.0):
        watch.enter("data")
        device.host += fetch_s
        watch.enter("forward")
        device.launch(3.0)
        watch.enter("backward")
        device.launch(5.0)
    watch.enter("all-reduce")
    done = device.stream - 1.0 + all_reduce_s
    if blocks_host:  # Horovod's synchronize
        device.host = max(device.host, done)
    else:  # NCCL's wait
        device.stream = max(device.stream, done)
    watch.enter("optimizer")
    device.launch(0.5)
    watch.enter(None)


@pytest.mark.parametrize("blocks_host", [True, False])
@pytest.mark.parametrize(("all_reduce_s", "visible_s"), [(4.0, 3.0), (0.5, 0.0)])
def test_times_are_the_devices_whether_an_all_reduce_blocks_the_host_or_orders_streams(
    device: FakeDevice, watch: Stopwatch, all_reduce_s: float, visible_s: float, blocks_host: bool
) -> None:
    update(device, watch, all_reduce_s=all_reduce_s, blocks_host=blocks_host)
    assert device.num_waits == 0
    # The first samples arrive after 2 s, while the device has no work; the second ones after 20 s, of which it works 8.
    expected = {"data": 2.0 + 12.0, "forward": 6.0, "backward": 10.0, "all-reduce": visible_s, "optimizer": 0.5}
    assert watch.read() == pytest.approx(expected)
    assert device.num_waits == 1


def test_reading_starts_again_and_reuses_the_events(device: FakeDevice, watch: Stopwatch) -> None:
    for _ in range(3):
        update(device, watch, all_reduce_s=2.0, blocks_host=False)
    first, num_events = watch.read(), device.num_events
    device.launch(100.0)  # an evaluation, between two updates
    for _ in range(3):
        update(device, watch, all_reduce_s=2.0, blocks_host=False)
    second = watch.read()
    assert first["all-reduce"] == second["all-reduce"] == pytest.approx(3.0)
    assert second["optimizer"] == pytest.approx(1.5)
    assert device.num_events <= num_events + 1
    assert watch.read() == dict.fromkeys(STAGES, 0.0)


def test_the_last_stage_of_an_update_that_fails_does_not_count(device: FakeDevice, watch: Stopwatch) -> None:
    watch.begin("forward")
    device.launch(1.0)
    watch.enter("backward")
    device.host += 50.0  # it fails, and the run continues later
    update(device, watch, all_reduce_s=1.0, blocks_host=True)
    seconds = watch.read()
    assert (seconds["forward"], seconds["backward"]) == pytest.approx((7.0, 10.0))


def test_marks_that_nothing_reads_are_added_up(
    device: FakeDevice, watch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_MARKS", 4)
    for _ in range(5):
        update(device, watch, all_reduce_s=2.0, blocks_host=False)
    assert device.num_events == 4
    seconds = watch.read()
    assert (seconds["backward"], seconds["all-reduce"], seconds["optimizer"]) == pytest.approx((50.0, 5.0, 2.5))


def test_a_cpu_is_timed_by_the_clock_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: Iterator[int] = count(start=100, step=7)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    watch = stopwatch_of(torch.device("cpu"))
    stages: list[Stage | None] = ["data", "forward", "forward", None]
    for stage in stages:
        watch.enter(stage)
    assert watch.read() == pytest.approx({**dict.fromkeys(STAGES, 0.0), "data": 7.0, "forward": 14.0})
    assert isinstance(watch._events[0], HostEvent)


def test_a_gpu_is_timed_by_its_events_in_its_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()

    def event(*, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return device.make_event()

    streams = {torch.device("cuda", 1): "stream"}
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    watch = stopwatch_of(torch.device("cuda", 1))
    watch.begin("backward")
    device.launch(3.0)
    watch.enter(None)
    assert watch.read()["backward"] == pytest.approx(3.0)


def test_a_record_has_the_share_of_each_stage(tmp_path: Path) -> None:
    plan = compile_plan(small_job(), 1, NUM_TRAIN)
    trainer = make_trainer(small_job(), SingleRank(), tmp_path)
    trainer.state.samples = 32
    window = MetricWindow(updates=2, samples=32, weight=32.0, loss=48.0, metrics={"top1": (8.0, 32.0)})
    seconds: dict[Stage, float] = {"data": 0.5, "forward": 2.0, "backward": 4.0, "all-reduce": 1.0, "optimizer": 0.5}
    record = window.record(plan, 0, plan.schedule.phases[0], trainer.state, None, seconds)
    shares = (record.data_wait_pct, record.backward_pct, record.allreduce_pct, record.optimizer_pct)
    assert shares == pytest.approx((6.25, 50.0, 12.5, 6.25))
    assert record.samples_per_s == pytest.approx(4.0)
