"""Kills this process in the middle of a write: patched into a rank from outside, without any hook in the package."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.storage.atomic import UnbufferedFile

VARIABLE = "HVD_BATCHGROW_TEST_SABOTAGE"
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK")
PLACES = ("write", "fsync", "replace", "unlink")


@dataclass(frozen=True)
class Sabotage:
    """Where a rank kills itself."""

    place: str
    """One of PLACES: a write is cut in half; the others are killed before or after the call."""
    call: int
    """At which call of it, from 1."""
    after: bool

    def __str__(self) -> str:
        return f"{self.place}:{self.call}:{int(self.after)}"

    @classmethod
    def parse(cls, text: str) -> Sabotage:
        """The inverse of `str`."""
        place, call, after = text.split(":")
        return cls(place, int(call), after == "1")

    def plant(self) -> None:
        """From now on, until the call comes."""
        if self.place == "write":
            UnbufferedFile.write = _cut(UnbufferedFile.write, self.call)  # type: ignore[method-assign]
        else:
            setattr(os, self.place, _deadly(getattr(os, self.place), self.call, after=self.after))


def die() -> None:
    """As at a loss of power: no handler, no `finally`."""
    os.kill(os.getpid(), signal.SIGKILL)


def _deadly(function: Callable[..., Any], call: int, *, after: bool) -> Callable[..., Any]:
    calls = itertools.count(1)

    def call_or_die(*arguments: Any, **options: Any) -> Any:
        is_last = next(calls) == call
        if is_last and not after:
            die()
        result = function(*arguments, **options)
        if is_last:
            die()
        return result

    return call_or_die


def _cut(write: Callable[..., int], call: int) -> Callable[..., int]:
    calls = itertools.count(1)

    def write_or_die(self: Any, data: bytes) -> int:
        if next(calls) == call:
            write(self, memoryview(data)[: len(data) // 2])
            die()
        return write(self, data)

    return write_or_die


def plant_from_environment() -> None:
    """What the environment names, if it does so for this rank."""
    if text := os.environ.pop(VARIABLE, ""):
        rank, _, sabotage = text.partition(":")
        mine = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
        if mine == rank:
            Sabotage.parse(sabotage).plant()


if __name__ == "__main__":
    # As a launcher's command, in the place of hvd-batchgrow.
    import sys

    from hvd_batchgrow.cli import main

    plant_from_environment()
    sys.exit(main())
