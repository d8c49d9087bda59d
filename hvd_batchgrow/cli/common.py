"""What the commands share: the job with its overrides, the ranks, the terminal."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hvd_batchgrow.comm.launcher_env import RELAY_S, Backend, launched_by
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import load_job, override_words
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.observers.console import PlainConsole

if TYPE_CHECKING:  # torch takes seconds to import, and `plan` does without it
    from hvd_batchgrow.comm.ranks import Ranks


@dataclass(frozen=True)
class JobCommand:
    """What all commands on a job take."""

    job: Annotated[Path, tyro.conf.Positional]
    """The job file; any key of it can be overridden, as by --optim.lr 0.2."""
    name: str | None = None
    """Name of the run; otherwise the job's."""
    seed: int | None = None
    """Seed of the run; otherwise the job's."""

    def load(self, overrides: dict[str, Any]) -> Job:
        """The job with what the command line puts over it."""
        flags = {"name": self.name, "seed": self.seed}
        return load_job(self.job, overrides | {key: value for key, value in flags.items() if value is not None})

    def words(self, overrides: dict[str, Any]) -> list[str]:
        """Return the words by which another command reads the same job."""
        seed = [] if self.seed is None else [f"--seed={self.seed}"]
        return [str(self.job), *([f"--name={self.name}"] if self.name else []), *seed, *override_words(overrides)]


@dataclass(frozen=True)
class RanksCommand(JobCommand):
    """What commands take that several ranks run together."""

    backend: Backend = "auto"
    """What ranks talk through; auto: Horovod where it can be imported, else torch.distributed, as under torchrun."""


def with_ranks(work: Callable[[Ranks], ExitCode], backend: Backend) -> ExitCode:
    """Join the other ranks, work, and leave; a rank that fails alone takes the others down with it."""
    from hvd_batchgrow.comm.backend import connect
    from hvd_batchgrow.comm.ranks import CollectiveError
    from hvd_batchgrow.train.malloc_tuning import keep_freed_memory

    keep_freed_memory()
    ranks = connect(backend)
    try:
        code = work(ranks)
        ranks.close()
        return code
    except CollectiveError as failure:
        if failure.error:
            print(failure.error, file=sys.stderr)
        ranks.close()
        return failure.code
    except BaseException as error:
        place = f"rank {ranks.rank} of {ranks.size} on {socket.gethostname()}"
        text = str(error) if isinstance(error, RunError) else traceback.format_exc()
        print(f"{place} failed:\n{text}", file=sys.stderr, flush=True)
        if ranks.size > 1:
            time.sleep(RELAY_S)
        ranks.abort(ExitCode.FAILURE)
        raise


def refuse_overrides(overrides: dict[str, Any]) -> None:
    """Raises JobError if the command line has keys of a job file, on a command that takes none."""
    if overrides:
        raise JobError([Fault(key, "there is no job to put it over") for key in overrides], "command line")


def terminal(stream: Any, *, quiet: bool = False) -> PlainConsole:
    """A console that draws on a terminal only, and elsewhere does not fold log lines at 80 columns."""
    # Open MPI gives a rank a pseudo-terminal that nobody looks at: what it relays may be a file.
    is_terminal = stream.isatty() and launched_by(os.environ) is None
    return PlainConsole(stream, None if is_terminal else 140, is_terminal=is_terminal, quiet=quiet)
