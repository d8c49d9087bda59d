"""Shared by the commands: the job with its overrides, the ranks, the terminal."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import tyro

from hvd_batchgrow.cli.paused_gc import paused_gc
from hvd_batchgrow.comm.launcher_env import RELAY_S, Backend, launched_by
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.layout import LayoutSection
from hvd_batchgrow.config.split import source_size
from hvd_batchgrow.job_file import load_job, override_words
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError, unwritable
from hvd_batchgrow.observers.console import PlainConsole, UnreliableStream

if TYPE_CHECKING:  # torch takes seconds to import, and `plan` does without it
    from hvd_batchgrow.comm.ranks import Ranks
    from hvd_batchgrow.schedule.adaptive.decisions import Decision
    from hvd_batchgrow.schedule.cost.cost_file import CostFile
    from hvd_batchgrow.schedule.plan import Plan


@dataclass(frozen=True)
class JobCommand:
    """Options of all commands that read a job file."""

    job: Annotated[Path, tyro.conf.Positional]
    """The job file; any of its keys can be overridden, for example by --optim.lr 0.2."""
    name: Optional[str] = None
    """Name of the run; by default the job file's."""
    seed: Optional[int] = None
    """Seed of the run; by default the job file's."""

    def load(self, overrides: dict[str, Any]) -> Job:
        """Return the job with the overrides of the command line; its samples are counted if their number is unknown."""
        job = self.read(overrides)
        if source_size(job.data) is not None:
            return job
        from hvd_batchgrow.data.count_samples import with_counted_samples
        from hvd_batchgrow.observers.progress import work_progress

        with work_progress(terminal(sys.stderr)) as report:
            return with_counted_samples(job, report)

    def read(self, overrides: dict[str, Any]) -> Job:
        """Return the job as the file and the command line state it."""
        flags = {"name": self.name, "seed": self.seed}
        return load_job(self.job, overrides | {key: value for key, value in flags.items() if value is not None})

    def words(self, overrides: dict[str, Any]) -> list[str]:
        """Return the arguments with which another command reads the same job."""
        seed = [] if self.seed is None else [f"--seed={self.seed}"]
        return [str(self.job), *([f"--name={self.name}"] if self.name else []), *seed, *override_words(overrides)]


@dataclass(frozen=True)
class RanksCommand(JobCommand):
    """Options of commands that several ranks run together."""

    backend: Backend = "auto"
    """Library for collectives. auto: Horovod; torch.distributed under torchrun, without Horovod, or if it cannot sum
    on the GPUs."""

    def with_ranks(self, work: Callable[[Ranks], ExitCode], overrides: dict[str, Any]) -> ExitCode:
        """Connect the ranks and call `work`, as `run_on_ranks` does."""
        try:
            layout = self.read(overrides).layout
        except JobError:
            if launched_by(os.environ) is None:  # before torch is imported, which takes seconds
                raise
            layout = LayoutSection()  # `work` reports it on rank 0
        return run_on_ranks(work, self.backend, layout)


def plan_with_costs(job: Job, ranks: int, cost: Path | None, ranks_per_node: int = 1) -> Plan:
    """Return the plan of a job; `--cost` decides the ranks of its phases if its layout.grow_by is 'auto'.

    The numbers that it chooses fit on one node or fill whole nodes.

    Raises:
        JobError: the job cannot be planned, or a cost file is given that it does not use.
    """
    from hvd_batchgrow.data.source_checks import known_num_samples
    from hvd_batchgrow.schedule.cost.cost import choose_ranks
    from hvd_batchgrow.schedule.cost.cost_file import load_cost_file
    from hvd_batchgrow.schedule.plan import compile_plan

    num_samples = known_num_samples(job.data)
    if cost is None:
        return compile_plan(job, ranks, num_samples)
    if job.layout.grow_by != "auto":
        fault = f"is for layout.grow_by = 'auto', and the job has {job.layout.grow_by!r}"
        raise JobError([Fault("--cost", f"{fault}: remove it, or add --layout.grow-by auto")], "command line")
    choice = choose_ranks(job, num_samples, load_cost_file(cost), ranks, ranks_per_node)
    return compile_plan(job, ranks, num_samples, choice)


def plan_twin(
    job: Job, ranks: int, num_samples: int, figures: CostFile | None, decisions: Sequence[Decision] = ()
) -> Plan:
    """Return the plan of a job's decay twin, which `plan` prints and `twin` trains.

    Its batch never grows, so it uses fewer ranks than the job if the batch requires it. With layout.grow_by = "auto",
    costs choose them by the job's objective.

    Args:
        job: the job, as the user wrote it.
        ranks: available ranks.
        num_samples: N.
        figures: the content of --cost, if any.
        decisions: those of the job's trigger.

    Raises:
        JobError: the job has no twin, or `figures` do not match it.
    """
    from hvd_batchgrow.schedule.plan import compile_plan
    from hvd_batchgrow.schedule.twin import compile_twin, decay_twin

    twin = decay_twin(job, num_samples, decisions)
    if figures is None or job.layout.grow_by != "auto":
        return compile_twin(twin, ranks, num_samples)
    from hvd_batchgrow.schedule.cost.cost import choose_ranks

    # Without the job's time limit: the twin is a reference for comparison and need not meet it.
    twin = twin.model_copy(update={"layout": job.layout.model_copy(update={"time_limit_h": None})})
    return compile_plan(twin, ranks, num_samples, choose_ranks(twin, num_samples, figures, ranks))


def run_on_ranks(work: Callable[[Ranks], ExitCode], backend: Backend, layout: LayoutSection) -> ExitCode:
    """Connect the ranks, call `work`, and shut down; if this rank alone fails, abort all ranks."""
    with paused_gc():
        from hvd_batchgrow.comm.backend import connect
        from hvd_batchgrow.comm.ranks import CollectiveError
        from hvd_batchgrow.train.malloc_tuning import keep_freed_memory

    keep_freed_memory()
    ranks = connect(backend, layout.device, layout.ranks_per_gpu)
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
        text = str(error) if isinstance(error, RunError) else traceback.format_exc()
        who = f"rank {ranks.rank} of {ranks.size} on {socket.gethostname()}"
        print(f"{who} failed:\n{text}", file=sys.stderr, flush=True)
        if ranks.size > 1:
            time.sleep(RELAY_S)
        ranks.abort(ExitCode.FAILURE)
        raise


def unfinished_until_done(ranks: Ranks, train: Callable[[], ExitCode]) -> ExitCode:
    """Call `train`; HVD_BATCHGROW_UNFINISHED may name a file for a batch script, which exists until it is done."""
    name = os.environ.get("HVD_BATCHGROW_UNFINISHED")
    unfinished = Path(name) if name and ranks.rank == 0 else None
    if unfinished:
        try:
            unfinished.touch()
        except OSError as error:  # train also from a read-only working folder
            lost = "if the launcher loses a host and ends with code 0, the batch script does not notice it"
            print(f"note: {unwritable(unfinished, error)}; {lost}", file=sys.stderr, flush=True)
    code = train()
    if unfinished and code == ExitCode.DONE:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return code


def refuse_overrides(overrides: dict[str, Any]) -> None:
    """Raise JobError if a command that reads no job file is given keys of one."""
    if overrides:
        fault = "this command reads no job file, so it has no keys to override"
        raise JobError([Fault(key, fault) for key in overrides], "command line")


def terminal(stream: Any, *, quiet: bool = False) -> PlainConsole:
    """Return a console that draws on terminals only, and does not fold log lines at 80 columns elsewhere."""
    # Under Open MPI a rank has a pseudo-terminal, but mpirun may forward its output to a file.
    is_terminal = stream.isatty() and launched_by(os.environ) is None
    if stream is sys.stderr:
        stream = UnreliableStream(stream)
    return PlainConsole(stream, None if is_terminal else 140, is_terminal=is_terminal, quiet=quiet)


def one_line(path: Path) -> str:
    """Return a path as one printable line."""
    text = str(path)
    return text if text.isprintable() else repr(text)
