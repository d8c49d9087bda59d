"""The rows of the GPU check: what each one does, how long it may take, and which packages it needs.

Only Python's standard library is imported here: the check starts on a machine where other packages are missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

TOTAL_S = 480.0
"""Limit of all rows together, with their default budgets."""

LEAST_TURNS, MOST_TURNS = 3, 41
"""Turns for a median; a row that is slow may exceed its budget for the least."""

Device = Literal["cuda", "cpu"]

_TRAINING = ("crc32c", "numpy", "pillow", "pydantic", "torch")
_TESTS = ("hypothesis", "pytest", "pytest-xdist", "rich", "tomli-w", "tyro")


class Skip(Exception):  # noqa: N818  # not an error
    """A row cannot run here; the message says why."""


@dataclass(frozen=True)
class Row:
    """A row of the check."""

    title: str
    budget_s: float
    """Default time budget, including the start of the row's process."""
    needs: tuple[str, ...]
    """Distributions without which the row is skipped."""
    module: str
    """Module whose `run` is called with the row's name and `Settings`, and returns an `Outcome`."""


ROWS: dict[str, Row] = {
    "tests": Row("tests/gpu", 110.0, (*_TRAINING, *_TESTS), "benchmarks.gpu.test_suite"),
    "ghost_norm": Row(
        "ghost norm, forward and backward, compared with a copy of the bytes that these must read and write",
        45.0,
        ("numpy", "torch"),
        "benchmarks.gpu.ghost_norm",
    ),
    "optimizers": Row(
        "updates of all weights of ResNet-50", 25.0, ("numpy", "pydantic", "torch"), "benchmarks.gpu.optimizers"
    ),
    "resnet50": Row(
        "ResNet-50, bfloat16, channels_last, one batch again and again",
        60.0,
        (*_TRAINING, "torchvision"),
        "benchmarks.gpu.training",
    ),
    "resnet50_dali": Row(
        "ResNet-50, bfloat16, channels_last, JPEG images read by DALI",
        75.0,
        (*_TRAINING, "torchvision", "nvidia-dali"),
        "benchmarks.gpu.training",
    ),
    "wrn": Row("WRN-16-4, micro-batches of 128 images of 32 × 32", 45.0, _TRAINING, "benchmarks.gpu.training"),
    "twins": Row(
        "WRN-16-4 with a growing batch, and its twin with a decaying learning rate",
        60.0,
        (*_TRAINING, "tomli-w"),
        "benchmarks.gpu.twins",
    ),
    "two_ranks": Row(
        "two ranks on one device, gradients summed over Gloo", 40.0, _TRAINING, "benchmarks.gpu.two_ranks"
    ),
}


@dataclass(frozen=True)
class Settings:
    """How a row is to run."""

    device: Device
    until: float
    """Value of `time.monotonic()`, which all processes of a machine share, at which the budget is spent."""

    @property
    def is_tiny(self) -> bool:
        """Whether networks and sizes are tiny: on a CPU a row only shows that it works."""
        return self.device == "cpu"

    @property
    def wrn(self) -> str:
        """The name of the wide ResNet."""
        return "wrn_10_1" if self.is_tiny else "wrn_16_4"

    @property
    def turns(self) -> int:
        """The most turns, if the budget is large enough."""
        return LEAST_TURNS if self.is_tiny else MOST_TURNS

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return self.until - time.monotonic()

    def is_over(self, end: float | None = None) -> Callable[[], bool]:
        """Return a function that says whether the budget is spent, or an earlier `end` of the clock has passed."""
        return lambda: time.monotonic() >= (self.until if end is None else end)

    def part(self, number: int, count: int) -> Callable[[], bool]:
        """Return `is_over` of part `number` of `count` that share the rest of the budget evenly; call it in order."""
        return self.is_over(time.monotonic() + max(0.0, self.left_s) / (count - number))


def say(text: str) -> None:
    """Report progress: the check shows the last line of a row's output."""
    print(text, flush=True)
