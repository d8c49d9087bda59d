"""A stopwatch for the device that trains: the time that each stage of an update takes there, read without delay."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import torch

Stage = Literal["data", "forward", "backward", "all-reduce", "optimizer"]
"""data: no work is queued, because the host waits for samples. all-reduce: from the end of the backward to the end of
the all-reduces that it did not hide."""
STAGES: tuple[Stage, ...] = ("data", "forward", "backward", "all-reduce", "optimizer")
_MOST_MARKS = 1 << 16


class Event(Protocol):
    """A moment in the work of a device, such as `torch.cuda.Event(enable_timing=True)`."""

    def record(self, stream: Any) -> None:
        """Set the moment: when the work that is queued in a stream is done."""

    def synchronize(self) -> None:
        """Wait until the moment has passed."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds to a later event."""


class HostEvent:
    """A moment in the work of a CPU, which is done when the host arrives there."""

    def record(self, stream: None) -> None:
        """Set the moment to now."""
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Do nothing: the moment has passed."""

    def elapsed_time(self, end_event: HostEvent, /) -> float:
        """Return the milliseconds to a later event."""
        return 1e3 * (end_event._seconds - self._seconds)


class Stopwatch:
    """Adds up the time of each stage.

    Marks are events in the device's stream, so neither the host nor the device waits for them. It therefore makes no
    difference whether an all-reduce blocks the host, as Horovod's does, or only orders streams, as NCCL's does: the
    time of a stage is that from the moment at which the device is done with all work of the stages before it.

    Args:
        make_event: makes an event; events are reused.
        stream: returns the stream that has the work of the device.
    """

    def __init__(self, make_event: Callable[[], Event] = HostEvent, stream: Callable[[], Any] = lambda: None) -> None:
        self._make_event, self._stream = make_event, stream
        self._events: list[Event] = []
        self._stages: list[Stage | None] = []
        """The stage that begins at each of the first events; the other events are unused."""
        self._seconds = dict.fromkeys(STAGES, 0.0)

    def begin(self, stage: Stage) -> None:
        """Begin an update with a stage. If the one before it failed, its last stage does not count."""
        if self._stages:
            self._stages[-1] = None
        self.enter(stage)

    def enter(self, stage: Stage | None) -> None:
        """Count the work that the host starts from now on as work of this stage; None: do not count it."""
        if len(self._stages) == _MOST_MARKS:
            self._add_up()
        place = len(self._stages)
        if place == len(self._events):
            self._events.append(self._make_event())
        self._events[place].record(self._stream())
        self._stages.append(stage)

    def read(self) -> dict[Stage, float]:
        """Wait until the device has passed the last mark; return the seconds of each stage since the last call."""
        self._add_up()
        seconds, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        return seconds

    def _add_up(self) -> None:
        if not self._stages:
            return
        last = len(self._stages) - 1
        self._events[last].synchronize()
        for place, stage in enumerate(self._stages[:last]):
            if stage:
                self._seconds[stage] += 1e-3 * self._events[place].elapsed_time(self._events[place + 1])
        self._events[0], self._events[last] = self._events[last], self._events[0]  # the last stage still runs
        self._stages = self._stages[last:]


def stopwatch_of(device: torch.device) -> Stopwatch:
    """Return a stopwatch by the events of a device, or by the clock of a CPU."""
    if device.type == "cpu":
        return Stopwatch()
    module = torch.get_device_module(device)
    return Stopwatch(partial(module.Event, enable_timing=True), partial(module.current_stream, device))
