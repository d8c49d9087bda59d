"""Runs a command in this process, as the command line would, and says what it did wrong."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from unittest.mock import patch

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import SingleRank

CPU_LIMIT_S, TIME_LIMIT_S = 30.0, 300.0
"""Of one case, which has a second's work to do; the machine may be busy, and a pipe may keep it waiting."""


@dataclass(frozen=True)
class Case:
    """A command on something that is damaged, and what is right for it to do."""

    kind: str
    about: str
    """What was done, for whoever looks into a failure."""
    words: Sequence[str]
    codes: frozenset[int]
    named: Sequence[str] = ()
    """All of these must be in the message of a refusal with code 2."""
    any_named: Sequence[str] = ()
    """One of these must be in the message of any refusal."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int | None
    """None: it raised, or did not end."""
    text: str
    """Of its errors."""
    seconds: float
    faults: tuple[str, ...]
    """What is wrong with that; empty: nothing."""


class _Hang(BaseException):
    """A case takes too long."""


def run(case: Case) -> Outcome:
    """Run a case in the working directory."""
    before = _entries()
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    begin = time.perf_counter()
    wrong: list[str] = []
    code: int | None = None
    # A rank that fails would end this process: here it is enough that it raises.
    no_abort = patch.object(SingleRank, "abort", lambda self, code: None)
    environment = patch.dict(os.environ, case.environment)
    with redirect_stdout(out), redirect_stderr(err), environment, _time_limit(), no_abort:
        try:
            code = main(list(case.words))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except _Hang:
            wrong.append(
                f"has not ended in {CPU_LIMIT_S:g} s of work or {TIME_LIMIT_S:g} s, it was at\n{traceback.format_exc()}"
            )
        except BaseException:
            wrong.append(f"raises\n{traceback.format_exc()}")
    seconds = time.perf_counter() - begin
    said, errors = (stream.buffer.getvalue().decode("utf-8") for stream in (out, err))
    wrong += _wrong(case, code, said, errors, left=_entries() - before) if not wrong else []
    return Outcome(code, errors, seconds, tuple(wrong))


def _wrong(case: Case, code: int | None, out: str, err: str, left: set[str]) -> Iterator[str]:
    if code not in case.codes:
        yield f"ends with {code}, not one of {sorted(case.codes)}"
    if "Traceback" in out + err:
        yield "prints a traceback"
    if code in {1, 2} and not (out + err).strip():
        yield "says nothing"
    if code == 2:
        # Earlier notes may come first. tyro prints a box.
        if not re.search(r"^.*: \d+ faults?$|For full helptext", err, flags=re.MULTILINE):
            yield "does not count its faults"
        yield from (f"does not name {name!r}" for name in case.named if name not in err)
    if code in {1, 2} and case.any_named and not any(name in err + out for name in case.any_named):
        yield f"names none of {list(case.any_named)}"
    # A refusal makes no run folder and leaves no temporary file; a lock beside a folder stays, as it must.
    litter = {name for name in left if not name.startswith("runs/.") or not name.endswith(".lock")} - {"runs"}
    if code == 2 and litter:
        yield f"leaves {sorted(litter)}"
    if any(name.endswith((".writing", ".removed", ".tmp")) for name in left):
        yield f"leaves a temporary file: {sorted(left)}"
    # Training may meet a bad sample after it has begun: then the folder is whole, and can be gone on from.
    for run in {name for name in left if Path(name).parent == Path("runs")} & litter:
        if lacking := {"job.toml", "plan.json", "record.json", "checkpoints"} - {p.name for p in Path(run).iterdir()}:
            yield f"leaves part of a run folder: {run} without {sorted(lacking)}"


def _entries() -> set[str]:
    """All that lies in the working directory, but for caches."""
    found = set()
    for folder, folders, files in os.walk("."):
        folders[:] = [name for name in folders if (folder, name) != (".", "cache")]
        found |= {os.path.relpath(os.path.join(folder, name)) for name in [*folders, *files]}
    return found


@contextmanager
def _time_limit() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hang

    limits = {
        signal.SIGALRM: (signal.ITIMER_REAL, TIME_LIMIT_S),
        signal.SIGPROF: (signal.ITIMER_PROF, CPU_LIMIT_S),
    }
    before = {number: signal.signal(number, ring) for number in limits}
    for timer, seconds in limits.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in limits.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextmanager
def folder(path: Path) -> Iterator[None]:
    """A new folder to work in, gone afterwards."""
    path.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
        for directory, names, _ in os.walk(path):
            for name in names:
                with suppress(OSError):
                    os.chmod(os.path.join(directory, name), 0o700)
        shutil.rmtree(path, ignore_errors=True)
