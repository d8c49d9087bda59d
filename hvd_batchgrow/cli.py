"""The command line: `hvd-batchgrow plan|train|twin|digest`."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from hvd_batchgrow.comm.launch import launched_by, launched_ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.job_file import load_job, split_overrides
from hvd_batchgrow.schedule.plan import compile_plan, decay_twin

if TYPE_CHECKING:  # torch takes seconds to import, and `plan` does without it
    from hvd_batchgrow.comm.ranks import Ranks
    from hvd_batchgrow.train.events import Observer, RunEnded


@dataclass(frozen=True)
class JobCommand:
    """What all commands on a job take."""

    job: Annotated[Path, tyro.conf.Positional]
    """The job file."""
    name: str | None = None
    """Name of the run; otherwise the job's."""
    seed: int | None = None
    """Seed of the run; otherwise the job's."""

    def load(self, overrides: dict[str, Any]) -> Job:
        """The job with what the command line puts over it."""
        flags = {"name": self.name, "seed": self.seed}
        return load_job(self.job, overrides | {key: value for key, value in flags.items() if value is not None})


@dataclass(frozen=True)
class PlanCommand(JobCommand):
    """Print what a job would do, phase by phase, without touching its data."""

    ranks: int = 1
    """How many ranks to plan for."""
    json: bool = False
    """Print plain data instead of tables."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Plan, and the decay twin beside it."""
        from hvd_batchgrow.data.known import known_num_samples
        from hvd_batchgrow.watch.tables import plan_table

        job = self.load(overrides)
        num_samples = known_num_samples(job.data)
        plan = compile_plan(job, self.ranks, num_samples)
        if self.json:
            print(json.dumps(plan.to_dict(), indent=2))
            return ExitCode.DONE
        console = _console(sys.stdout)
        console.print(plan_table(plan))
        if job.schedule.policy != "decay":
            twin = compile_plan(decay_twin(job, num_samples), self.ranks, num_samples)
            console.print(plan_table(twin))
            console.print(f"{twin.num_updates / plan.num_updates:.2f}× fewer updates than the twin", highlight=False)
        return ExitCode.DONE


@dataclass(frozen=True)
class TrainCommand(JobCommand):
    """Train a job; alone, or as one of the ranks that mpirun or horovodrun starts."""

    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest good checkpoint of the run, or start where there is none."""
    overwrite: bool = False
    """Remove the run of this name first."""
    runs_dir: Path = Path("runs")
    """Where run folders are made."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Train, and end with 75 if stopped."""
        return _with_ranks(lambda ranks: _exit_code([self.train(ranks, lambda: self.load(overrides))]))

    def train(self, ranks: Ranks, load: Callable[[], Job]) -> RunEnded:
        """One run, watched on the terminal."""
        from hvd_batchgrow.train.run import RunOptions, run_job
        from hvd_batchgrow.watch.progress import byte_progress

        console = _console(sys.stderr, quiet=ranks.local_rank != 0)
        options = RunOptions(self.runs_dir, resume=self.resume == "auto", overwrite=self.overwrite)
        with byte_progress(console) as report:
            return run_job(load, ranks, options, report, lambda job: _observers(job, console))


@dataclass(frozen=True)
class TwinCommand(TrainCommand):
    """Train a growth job and then its twin that decays the learning rate, and compare them."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Both runs, then the table."""
        return _with_ranks(lambda ranks: self.compare(ranks, overrides))

    def load_growing(self, overrides: dict[str, Any]) -> Job:
        """The job, which must not be its own twin."""
        job = self.load(overrides)
        if job.schedule.policy == "decay":
            fault = Fault("schedule.policy", "'decay' is what the twin does; twin compares it with 'grow'")
            raise JobError([fault], str(self.job))
        return job

    def load_twin(self, overrides: dict[str, Any]) -> Job:
        """The twin of the job."""
        from hvd_batchgrow.data.known import known_num_samples

        job = self.load(overrides)
        return decay_twin(job, known_num_samples(job.data))

    def compare(self, ranks: Ranks, overrides: dict[str, Any]) -> ExitCode:
        """Train one after the other; a stop in the first ends both."""
        from hvd_batchgrow.watch.tables import result_table

        grown = self.train(ranks, lambda: self.load_growing(overrides))
        if not grown.done:
            return ExitCode.STOPPED
        decayed = self.train(ranks, lambda: self.load_twin(overrides))
        if ranks.rank == 0 and decayed.done:
            console = _console(sys.stdout)
            console.print(result_table([("grow the batch", grown), ("decay the learning rate", decayed)]))
            for run in (grown, decayed):
                console.print(f"run folder: {run.folder}", highlight=False)
            console.print(f"curves: tensorboard --logdir {self.runs_dir}", highlight=False)
        return _exit_code([grown, decayed])


@dataclass(frozen=True)
class DigestCommand:
    """Print one SHA-256 over the weights and buffers of a run, and how runs differ."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders; each after the first is compared with the first."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """The digest alone for one run; for several a line each."""
        from hvd_batchgrow.train.digest import compare_weights, final_weights

        if overrides:
            raise JobError([Fault(key, "there is no job to put it over") for key in overrides], "command line")
        first, *others = (final_weights(run) for run in self.runs)
        for weights in (first, *others):
            if not weights.is_final:
                print(f"{weights.run} is not done: these are its weights at sample {weights.samples}", file=sys.stderr)
        if not others:
            print(first.digest)
            return ExitCode.DONE
        print(f"{first.digest}  {first.run}")
        for other in others:
            print(f"{other.digest}  {other.run}  {compare_weights(first, other)}")
        return ExitCode.DONE


Command = (
    Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[TrainCommand, tyro.conf.subcommand("train")]
    | Annotated[TwinCommand, tyro.conf.subcommand("twin")]
    | Annotated[DigestCommand, tyro.conf.subcommand("digest")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        words, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        command: Any = tyro.cli(
            Command,
            prog="hvd-batchgrow",
            description="Grow the batch where others decay the learning rate. "
            "Any key of the job file can be put over on the command line: --optim.lr 0.2",
            args=words,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
        )
        return int(command.run(overrides))
    except JobError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_JOB
    except RunError as error:
        rank, _ = launched_ranks(os.environ)
        if rank == 0:  # ranks that could not even join each other fail alike
            print(error, file=sys.stderr)
        return ExitCode.FAILURE


def _with_ranks(work: Callable[[Ranks], ExitCode]) -> ExitCode:
    """Join the other ranks, work, and leave; a rank that fails alone takes the others down with it."""
    from hvd_batchgrow.comm.ranks import AgreedFailure, connect

    ranks = connect()
    try:
        code = work(ranks)
    except AgreedFailure as failure:
        if failure.error:
            print(failure.error, file=sys.stderr)
        code = failure.code
    except BaseException as error:
        place = f"rank {ranks.rank} of {ranks.size} on {socket.gethostname()}"
        text = str(error) if isinstance(error, RunError) else traceback.format_exc()
        print(f"{place} failed:\n{text}", file=sys.stderr, flush=True)
        ranks.abort(ExitCode.FAILURE)
        raise
    ranks.close()
    return code


def _observers(job: Job, console: Console) -> list[Observer]:
    from hvd_batchgrow.watch.metrics import MetricsFile
    from hvd_batchgrow.watch.progress import ProgressDisplay
    from hvd_batchgrow.watch.tensorboard import TensorBoard

    return [ProgressDisplay(console), MetricsFile(), *([TensorBoard()] if job.watch.tensorboard else [])]


def _exit_code(runs: Sequence[RunEnded]) -> ExitCode:
    return ExitCode.DONE if all(run.done for run in runs) else ExitCode.STOPPED


def _console(stream: Any, *, quiet: bool = False) -> Console:
    """A console that draws on a terminal only, and elsewhere does not fold log lines at 80 columns."""
    # Open MPI gives a rank a pseudo-terminal that nobody looks at: what it relays may be a file.
    terminal = stream.isatty() and launched_by(os.environ) is None
    return Console(file=stream, quiet=quiet, force_terminal=terminal, width=None if terminal else 140)


if __name__ == "__main__":
    sys.exit(main())
