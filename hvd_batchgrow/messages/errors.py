"""What can go wrong on the user's side, and the exit code that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

MOST_TOLD = 100
"""Of a job's faults; a file with more is no job file."""


UNNAMED = "job"
"""The source of faults where it is not known."""


class ExitCode(IntEnum):
    """How a command ends; batch systems act on it."""

    DONE = 0
    FAILURE = 1
    BAD_JOB = 2
    STOPPED = 75
    """Stopped with a good checkpoint: run the same command again (sysexits' EX_TEMPFAIL)."""
    INTERRUPTED = 130
    """Ended at once by SIGINT, as a shell puts it: 128 and the signal's number."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a job: where it is (`schedule.noise_factor`) and what would be right."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class JobError(ValueError):
    """A job that cannot run as it is written: every fault found in it, in one exception; told are the first hundred."""

    def __init__(self, faults: Sequence[Fault], source: str = UNNAMED) -> None:
        self.faults = tuple(faults)
        self.source = source
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
        more = [f"… and {len(self.faults) - MOST_TOLD} more"] if len(self.faults) > MOST_TOLD else []
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, self.faults[:MOST_TOLD]), *more]))


@contextmanager
def faults_of(source: str) -> Iterator[None]:
    """Faults that are told without saying of what are those of this source."""
    try:
        yield
    except JobError as error:
        if error.source != UNNAMED:
            raise
        raise JobError(error.faults, source) from error


class RunError(RuntimeError):
    """A run that cannot start or go on, for a reason that the user can mend."""


def unwritable(place: object, error: OSError) -> RunError:
    """A file or folder that cannot be written, and why, in the system's words."""
    return RunError(f"{place} cannot be written: {error.strerror or error}")


def first_fault(error: ValidationError, whole: str = "all of it") -> str:
    """The first fault that pydantic has found, as `place: what is wrong`; one of everything is at `whole`."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"
