"""Errors that a user can fix, and exit codes."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

MOST_REPORTED = 100
"""Most faults that one message lists; a file with more is probably not a job file."""

UNNAMED = "job"
"""Source of faults whose job file is not known."""

_MOST_CHARACTERS = 300


class ExitCode(IntEnum):
    """Exit code of a command."""

    DONE = 0
    FAILURE = 1
    BAD_JOB = 2
    STOPPED = 75
    """Stopped with a good checkpoint: run the same command again (EX_TEMPFAIL of sysexits.h)."""
    INTERRUPTED = 130
    """Ended immediately by SIGINT: 128 plus the signal's number."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a job: its key (`schedule.noise_factor`), and what would be right."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class JobError(ValueError):
    """A job that cannot run as written. Holds every fault; the message lists the first hundred."""

    def __init__(self, faults: Sequence[Fault], source: str = UNNAMED) -> None:
        self.faults = tuple(faults)
        self.source = source
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
        more = [f"… and {len(self.faults) - MOST_REPORTED} more"] if len(self.faults) > MOST_REPORTED else []
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, self.faults[:MOST_REPORTED]), *more]))


@contextmanager
def faults_of(source: str) -> Iterator[None]:
    """Attach this source's name to errors without a source."""
    try:
        yield
    except JobError as error:
        if error.source != UNNAMED:
            raise
        raise JobError(error.faults, source) from error


class RunError(RuntimeError):
    """A run cannot start or continue, for a reason that the user can fix."""


def reason_of(error: Exception) -> str:
    """Return the system's reason for a failed call, without the path; for any other error, its message."""
    return getattr(error, "strerror", None) or str(error)


def unreadable(place: object, error: Exception) -> RunError:
    """Return the error for a file or folder that cannot be read."""
    return RunError(f"{place} cannot be read: {reason_of(error)}")


def unwritable(place: object, error: OSError) -> RunError:
    """Return the error for a file or folder that cannot be written."""
    return RunError(f"{place} cannot be written: {reason_of(error)}")


def first_fault(error: ValidationError, whole: str = "all of it") -> str:
    """Return pydantic's first fault as `key: message`; `whole` stands for the key of a fault of the whole value."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"


def describe_error(error: BaseException) -> str:
    """Return an error and where it was raised, preferably in the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    torch = find_spec("torch")
    files = (importlib.__file__, str(Path(__file__).parent), *([torch.origin] if torch and torch.origin else []))
    between = tuple(str(Path(file).parent) for file in files)
    outside = [frame for frame in frames if not frame.filename.startswith((*between, "<frozen"))]
    place = f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {_in_one_line(str(error))}{place}"


def _in_one_line(text: str) -> str:
    """Return a message without line breaks, shortened if it is long: some of torch's list every possible value."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _MOST_CHARACTERS else f"{joined[:_MOST_CHARACTERS]} …"
