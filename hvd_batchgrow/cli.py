"""The command line: `hvd-batchgrow plan|probe|train|twin|verify|digest|audit`."""

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

import tomli_w
import tyro
from rich.console import Console

from hvd_batchgrow.comm.launch import launched_by, launched_ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.job_file import load_job, split_overrides
from hvd_batchgrow.schedule.plan import Plan, compile_plan, compile_twin, decay_twin

if TYPE_CHECKING:  # torch takes seconds to import, and `plan` does without it
    from hvd_batchgrow.comm.ranks import Ranks
    from hvd_batchgrow.schedule.cost import Cost
    from hvd_batchgrow.train.events import Observer, RunEnded
    from hvd_batchgrow.train.stop import StopRequest


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
    """How many ranks can be had."""
    json: bool = False
    """Print plain data instead of tables."""
    twin: bool = False
    """Print the job file of the twin that decays the learning rate, and nothing else."""
    plot: Path | None = None
    """Draw learning rate, batch and noise scale into a .png, .svg or .pdf."""
    cost: Path | None = None
    """A file that `probe` has written: predict seconds and rank-hours, and decide layout.growth = "auto"."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Plan, and the decay twin beside it."""
        from hvd_batchgrow.data.known import known_num_samples
        from hvd_batchgrow.schedule.cost import choose_ranks, predict
        from hvd_batchgrow.schedule.measured import load_probe

        job = self.load(overrides)
        num_samples = known_num_samples(job.data)
        probe = load_probe(self.cost) if self.cost else None
        choose = choose_ranks(job, num_samples, probe, self.ranks) if probe else None
        plan = compile_plan(job, self.ranks, num_samples, choose)
        twin_job = None if job.schedule.policy == "decay" else decay_twin(job, num_samples)
        if self.twin:
            self.print_twin(twin_job)
            return ExitCode.DONE
        # The twin runs wherever its batch can be formed, if not on as many ranks as the job.
        plans = [plan, *([compile_twin(twin_job, self.ranks, num_samples)] if twin_job else [])]
        if self.plot:
            from hvd_batchgrow.watch.plot import plot_plans

            plot_plans(plans[::-1], self.plot)
        costs = [predict(plan, probe) for plan in plans] if probe else []
        self.print_json(plans, costs) if self.json else self.print_tables(plans, costs)
        return ExitCode.DONE

    def print_twin(self, twin: Job | None) -> None:
        """The twin as a job file."""
        if twin is None:
            raise JobError([Fault("schedule.policy", "'decay' is its own twin")], str(self.job))
        print(tomli_w.dumps(twin.model_dump(mode="json", exclude_none=True)))

    def print_json(self, plans: Sequence[Plan], costs: Sequence[Cost]) -> None:
        """The plan, with the twin's beside it, each with its cost."""
        trees = [plan.to_dict() for plan in plans]
        for tree, cost in zip(trees, costs, strict=False):
            tree["cost"] = cost.to_dict()
        if len(plans) > 1:
            trees[0] |= {"twin": trees[1], "updates_ratio": plans[1].num_updates / plans[0].num_updates}
        print(json.dumps(trees[0], indent=2))

    def print_tables(self, plans: Sequence[Plan], costs: Sequence[Cost]) -> None:
        """Tables, what happens between phases, and the saving."""
        from hvd_batchgrow.schedule.transitions import describe_transitions
        from hvd_batchgrow.watch.tables import cost_table, plan_table

        console = _console(sys.stdout)
        for plan in plans:
            console.print(plan_table(plan))
            for line in describe_transitions(plan):
                console.print(f"  {line}", highlight=False, soft_wrap=True)
            console.print()
        if len(plans) > 1:
            ratio = plans[1].num_updates / plans[0].num_updates
            console.print(f"{ratio:.2f}× fewer updates than the twin", highlight=False)
        if costs:
            console.print(cost_table([(plan.job.name, cost) for plan, cost in zip(plans, costs, strict=True)]))
            for note in dict.fromkeys(note for cost in costs for note in cost.notes):
                console.print(note, style="yellow", highlight=False)


@dataclass(frozen=True)
class ProbeCommand(JobCommand):
    """Measure what updates of a job cost on the ranks that are launched, for `plan --cost`."""

    out: Path = Path("PROBE.json")
    """The figures go in here, beside those of other numbers of ranks."""
    budget_s: float = 25.0
    """About how long to measure; longer is steadier where the machine is shared."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Measure, and say what to do with it."""
        return _with_ranks(lambda ranks, stop: self.probe(ranks, overrides))

    def probe(self, ranks: Ranks, overrides: dict[str, Any]) -> ExitCode:
        """All ranks together."""
        from hvd_batchgrow.train.probe import probe_into
        from hvd_batchgrow.watch.progress import work_progress

        console = _console(sys.stderr, quiet=ranks.rank != 0)
        with work_progress(console) as report:
            probe_into(self.out, lambda: self.load(overrides), ranks, report, console.print, self.budget_s)
        console.print(f"written to {self.out}: hvd-batchgrow plan {self.job} --ranks {ranks.size} --cost {self.out}")
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
    updates: int | None = None
    """Stop after so many updates of this start, with a checkpoint to go on from."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Train, and end with 75 if stopped."""
        self.check_flags()
        return _with_ranks(lambda ranks, stop: _exit_code([self.train(ranks, stop, lambda: self.load(overrides))]))

    def check_flags(self) -> None:
        """A script that goes on by itself must not throw away what it goes on from."""
        if self.overwrite and self.resume == "auto":
            raise JobError([Fault("--overwrite", "contradicts --resume auto: choose one")], "command line")
        if self.updates is not None and self.updates < 1:
            raise JobError([Fault("--updates", f"must be at least 1, got {self.updates}")], "command line")

    def train(self, ranks: Ranks, stop: StopRequest, load: Callable[[], Job]) -> RunEnded:
        """One run, watched on the terminal."""
        from hvd_batchgrow.train.run import RunOptions, run_job
        from hvd_batchgrow.train.stop import StopAfter
        from hvd_batchgrow.watch.progress import work_progress

        console = _console(sys.stderr, quiet=ranks.local_rank != 0)
        options = RunOptions(self.runs_dir, resume=self.resume == "auto", overwrite=self.overwrite)
        with work_progress(console) as report:
            asked = StopAfter(stop, self.updates) if self.updates else stop
            return run_job(load, ranks, options, report, lambda job: _observers(job, console), asked)


@dataclass(frozen=True)
class TwinCommand(TrainCommand):
    """Train a growth job and then its twin that decays the learning rate, and compare them."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Both runs, then the table."""
        self.check_flags()
        return _with_ranks(lambda ranks, stop: self.compare(ranks, stop, overrides))

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

    def compare(self, ranks: Ranks, stop: StopRequest, overrides: dict[str, Any]) -> ExitCode:
        """Train one after the other; a stop in the first ends both."""
        from hvd_batchgrow.watch.tables import result_table

        grown = self.train(ranks, stop, lambda: self.load_growing(overrides))
        if not grown.done or ranks.any(flag=stop.asked):
            return ExitCode.STOPPED
        decayed = self.train(ranks, stop, lambda: self.load_twin(overrides))
        if ranks.rank == 0 and decayed.done:
            console = _console(sys.stdout)
            console.print(result_table([("grow the batch", grown), ("decay the learning rate", decayed)]))
            for run in (grown, decayed):
                console.print(f"run folder: {run.folder}", highlight=False)
            console.print(f"curves: tensorboard --logdir {self.runs_dir}", highlight=False)
        return _exit_code([grown, decayed])


@dataclass(frozen=True)
class VerifyCommand(JobCommand):
    """Do a few updates of a job under several layouts, as real processes, and compare the weights."""

    layouts: str | None = None
    """RANKSxPASSESxMICRO-BATCH of the first phase's batch, with commas between; otherwise some on 1 to 4 ranks."""
    updates: int = 2
    """How many updates each; rounding grows from one to the next, so that few tell more than many."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """A table; ends with 1 if a layout decides more than rounding, or in exact mode a bit."""
        from hvd_batchgrow.data.known import known_num_samples
        from hvd_batchgrow.train.verify import default_shapes, parse_shapes, verify
        from hvd_batchgrow.watch.tables import verify_table

        job = self.load(overrides)
        phase, group = compile_plan(job, 1, known_num_samples(job.data)).schedule.phases[0], job.model.ghost_batch
        exact = job.layout.exact
        shapes = (
            parse_shapes(self.layouts, phase.global_batch, group, exact=exact)
            if self.layouts
            else default_shapes(phase.global_batch, group, exact=exact)
        )
        options = [word for key, value in overrides.items() for word in (f"--{key}", json.dumps(value))]
        console = _console(sys.stderr)
        if self.seed is not None:
            options += ["--seed", str(self.seed)]
        results = verify(
            self.job, job, options, shapes, self.updates, lambda line: console.print(line, highlight=False)
        )
        _console(sys.stdout).print(verify_table(job, results, self.updates))
        return ExitCode.DONE if all(result.passed for result in results) else ExitCode.FAILURE


@dataclass(frozen=True)
class DigestCommand:
    """Print one SHA-256 over the weights and buffers of a run, and how runs differ."""

    first: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """More of them, each compared with the first."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """The digest alone for one run; for several a line each."""
        from hvd_batchgrow.train.digest import compare_weights, final_weights

        _refuse_overrides(overrides)
        first, *others = (final_weights(run) for run in (self.first, *self.others))
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


@dataclass(frozen=True)
class AuditCommand:
    """Prove from a run's record that it used each sample once an epoch, and compare the orders of runs."""

    first: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """More of them, each audited, and its order compared with the first's."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """A table for each run; ends with 1 if any sample was used twice, or left out, or out of order."""
        from hvd_batchgrow.train.audit import audit, compare_orders, read_consumed
        from hvd_batchgrow.watch.progress import work_progress
        from hvd_batchgrow.watch.tables import audit_table

        _refuse_overrides(overrides)
        console = _console(sys.stdout)
        with work_progress(_console(sys.stderr)) as report:
            audits = [audit(read_consumed(run), report) for run in (self.first, *self.others)]
        for result in audits:
            console.print(audit_table(result))
        for other in audits[1:]:
            console.print(compare_orders(audits[0].consumed, other.consumed), highlight=False, soft_wrap=True)
        return ExitCode.DONE if all(result.passed for result in audits) else ExitCode.FAILURE


Command = (
    Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[ProbeCommand, tyro.conf.subcommand("probe")]
    | Annotated[TrainCommand, tyro.conf.subcommand("train")]
    | Annotated[TwinCommand, tyro.conf.subcommand("twin")]
    | Annotated[VerifyCommand, tyro.conf.subcommand("verify")]
    | Annotated[DigestCommand, tyro.conf.subcommand("digest")]
    | Annotated[AuditCommand, tyro.conf.subcommand("audit")]
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


def _with_ranks(work: Callable[[Ranks, StopRequest], ExitCode]) -> ExitCode:
    """Join the other ranks, work, and leave; a rank that fails alone takes the others down with it."""
    from hvd_batchgrow.comm.ranks import AgreedFailure, connect
    from hvd_batchgrow.train.stop import StopRequest

    ranks = connect()
    try:
        with StopRequest() as stop:
            code = work(ranks, stop)
            ranks.close()
            return code
    except AgreedFailure as failure:
        if failure.error:
            print(failure.error, file=sys.stderr)
        ranks.close()
        return failure.code
    except BaseException as error:
        place = f"rank {ranks.rank} of {ranks.size} on {socket.gethostname()}"
        text = str(error) if isinstance(error, RunError) else traceback.format_exc()
        print(f"{place} failed:\n{text}", file=sys.stderr, flush=True)
        ranks.abort(ExitCode.FAILURE)
        raise


def _refuse_overrides(overrides: dict[str, Any]) -> None:
    if overrides:
        raise JobError([Fault(key, "there is no job to put it over") for key in overrides], "command line")


def _observers(job: Job, console: Console) -> list[Observer]:
    from hvd_batchgrow.watch.metrics import ConsumedFile, MetricsFile
    from hvd_batchgrow.watch.progress import ProgressDisplay
    from hvd_batchgrow.watch.tensorboard import TensorBoard

    return [
        ProgressDisplay(console),
        MetricsFile(),
        ConsumedFile(),
        *([TensorBoard()] if job.watch.tensorboard else []),
    ]


def _exit_code(runs: Sequence[RunEnded]) -> ExitCode:
    return ExitCode.DONE if all(run.done for run in runs) else ExitCode.STOPPED


def _console(stream: Any, *, quiet: bool = False) -> Console:
    """A console that draws on a terminal only, and elsewhere does not fold log lines at 80 columns."""
    # Open MPI gives a rank a pseudo-terminal that nobody looks at: what it relays may be a file.
    terminal = stream.isatty() and launched_by(os.environ) is None
    return Console(file=stream, quiet=quiet, force_terminal=terminal, width=None if terminal else 140)


if __name__ == "__main__":
    sys.exit(main())
