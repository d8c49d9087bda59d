"""`hvd-batchgrow train` and `twin`."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hvd_batchgrow.cli.common import RanksCommand, plan_twin, plan_with_costs, terminal, unfinished_until_done
from hvd_batchgrow.comm.launcher_env import is_elastic, restarts_ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.types import Margin, PositiveInt, Price, RunName
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError, faults_of
from hvd_batchgrow.train.liveness.stop import StopRequest

if TYPE_CHECKING:
    from hvd_batchgrow.comm.ranks import Ranks
    from hvd_batchgrow.observers.console import PlainConsole
    from hvd_batchgrow.schedule.adaptive.decisions import Decision
    from hvd_batchgrow.train.events import Observer, RunEnded

_SIGNAL_WAIT_S = 5.0
"""How long a stopped rank waits for SIGTERM. torchrun looks once per second for others that have joined."""


@dataclass(frozen=True)
class TrainCommand(RanksCommand):
    """Train a job, either alone or as one of the ranks that mpirun, horovodrun or torchrun starts."""

    resume: Literal["never", "auto"] = "never"
    """auto: resume from the run's newest good checkpoint, or start the run if it has no checkpoint."""
    overwrite: bool = False
    """Remove the run of this name first."""
    runs_dir: Path = Path("runs")
    """Folder for run folders."""
    max_updates: PositiveInt | None = None
    """Stop after this number of updates in this invocation, and write a checkpoint."""
    phases: str | None = None
    """FIRST-LAST: train only these phases, counted from 1, on exactly the ranks that they use (a job of a chain)."""
    fork: RunName | None = None
    """Name of a new run: continue with the job as it is now from the newest good checkpoint of the job's run."""
    replay: Path | None = None
    """A decisions.jsonl, or the folder of its run: grow the batch as recorded there, without measuring; later
    invocations do so too."""
    cost: Path | None = None
    """A file written by `probe`, or a MACHINE.toml, for layout.grow_by = "auto"."""
    price: Price | None = None
    """Price of one rank-hour, in any currency: print the cost of the run at its end. None: print no cost."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Train; return 75 if stopped before the end."""
        self.check_flags()
        with StopRequest(connecting=restarts_ranks(os.environ)) as stop:
            code = self.with_ranks(lambda ranks: self.train_alone(ranks, stop, overrides), overrides)
            return _after_signal(code, stop)

    def train_alone(self, ranks: Ranks, stop: StopRequest, overrides: dict[str, Any]) -> ExitCode:
        """Train this job only."""
        stop.connecting = False
        load = partial(self.load_for, ranks, overrides)
        return unfinished_until_done(ranks, lambda: _exit_code([self.train(ranks, stop, load)]))

    def check_flags(self) -> None:
        """Raise JobError for options that contradict each other; --overwrite must not remove a run to resume."""
        if self.overwrite and self.resume == "auto":
            raise JobError([Fault("--overwrite", "contradicts --resume auto: choose one")], "command line")
        if self.fork is not None:
            if self.overwrite or self.resume == "auto":
                fault = "starts a new run: remove --resume auto and --overwrite"
                raise JobError([Fault("--fork", fault)], "command line")
            if is_elastic(os.environ):
                fault = "an elastic job restarts its run and would fork again: fork on fixed ranks (--max-updates 1)"
                raise JobError([Fault("--fork", fault)], "command line")
        if self.max_updates is not None and restarts_ranks(os.environ):
            fault = "torchrun would start the ranks again after the stop: use it with --max-restarts 0"
            raise JobError([Fault("--max-updates", fault)], "command line")
        self.phase_range()

    def phase_range(self) -> tuple[int, int] | None:
        """Return the first and the last phase to train, from 1; None: all. Raises JobError."""
        if self.phases is None:
            return None
        if not (found := re.fullmatch(r"(\d+)-(\d+)", self.phases)):
            raise JobError([Fault("--phases", f"must be FIRST-LAST such as 1-2, got {self.phases!r}")], "command line")
        return int(found[1]), int(found[2])

    def load_for(self, ranks: Ranks, overrides: dict[str, Any]) -> Job:
        """Return the job; if costs decide its ranks, with the number of ranks of each phase filled in."""
        return self.with_ranks_by_cost(self.load(overrides), ranks)

    def with_ranks_by_cost(self, job: Job, ranks: Ranks) -> Job:
        """Return a job; if costs decide its ranks, with the number of ranks of each phase filled in."""
        from hvd_batchgrow.slurm.chain_jobs import with_ranks_per_phase

        return job if self.cost is None else with_ranks_per_phase(plan_with_costs(job, ranks.size, self.cost))

    def train(self, ranks: Ranks, stop: StopRequest, load: Callable[[], Job]) -> RunEnded:
        """Train one run, and show its progress on the terminal."""
        from hvd_batchgrow.observers.load_observers import check_observers
        from hvd_batchgrow.observers.progress import work_progress
        from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
        from hvd_batchgrow.train.run.run import RunOptions, run_job

        console = terminal(sys.stderr, quiet=ranks.local_rank != 0)
        options = RunOptions(
            self.runs_dir,
            resume=self.resume == "auto",
            overwrite=self.overwrite,
            phases=self.phase_range(),
            fork=self.fork,
            replay=self.replay,
            max_updates=self.max_updates,
        )
        state = ElasticState()

        def load_checked() -> Job:
            job = load()
            if ranks.rank == 0:
                with faults_of(job.name):
                    check_observers(job.logging.observers)  # before the data is loaded
            return job

        def attempt() -> RunEnded:
            with work_progress(console) as report, ExitStack() as stack:

                def observers(job: Job) -> list[Observer]:
                    return run_observers(job, console, stack)

                return run_job(load_checked, ranks, options, report, observers, stop, state)

        def is_over() -> bool:
            return stop.stop_requested or state.num_updates == self.max_updates

        ended = self.train_elastic(ranks, attempt, is_over) if ranks.elastic else attempt()
        if ranks.rank == 0:
            self.print_end_block(console, ended)
        return ended

    def print_end_block(self, console: PlainConsole, ended: RunEnded) -> None:
        """Print updates, samples and time against the plan. The files are read again, so they may be unreadable."""
        from hvd_batchgrow.observers.end_block import print_end_block
        from hvd_batchgrow.results.run_files import RunFiles

        try:
            print_end_block(console, RunFiles.read(ended.folder), self.price)
        except RunError as error:
            console.print(str(error), soft_wrap=True)

    def train_elastic(self, ranks: Ranks, attempt: Callable[[], RunEnded], is_over: Callable[[], bool]) -> RunEnded:
        """Train one run, with a new attempt after each change of the hosts."""
        from hvd_batchgrow.comm.elastic import ElasticRanks
        from hvd_batchgrow.train.elastic import run_elastic

        assert isinstance(ranks, ElasticRanks)

        def notify(line: str) -> None:
            if ranks.rank == 0:
                print(line, file=sys.stderr, flush=True)

        return run_elastic(attempt, ranks, is_over, notify)


@dataclass(frozen=True)
class TwinCommand(TrainCommand):
    """Train a growth job and then its twin that decays the learning rate, and compare them."""

    seeds: PositiveInt = 1
    """Number of pairs. Above 1: pairs with the seeds SEED, SEED + 1, …, named NAME-seedSEED and NAME-seedSEED-twin."""
    margin: Margin | None = None
    """Largest difference of the results that does not matter: percentage points for accuracy, otherwise the unit of the
    metric. None: do not test equivalence."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Train both runs, then print a table that compares them."""
        self.check_flags()
        if self.phases is not None:
            raise JobError([Fault("--phases", "a comparison needs all phases of both runs")], "command line")
        if self.fork is not None:
            raise JobError([Fault("--fork", "a comparison needs two whole runs: use train --fork")], "command line")
        if is_elastic(os.environ):  # a rank that joins would begin with the first run
            fault = "does not run as an elastic job: launch it on fixed ranks"
            raise JobError([Fault("twin", fault)], "command line")
        with StopRequest(connecting=restarts_ranks(os.environ)) as stop:
            code = self.with_ranks(lambda ranks: self.train_pairs(ranks, stop, overrides), overrides)
            return _after_signal(code, stop)

    def load_growing(self, ranks: Ranks, overrides: dict[str, Any]) -> Job:
        """Return the job, which must differ from its twin; the twin of an adaptive job is known after its run."""
        job = self.load(overrides)
        if job.schedule.is_own_twin:
            fault = Fault("schedule.policy", "'decay' is the policy of the twin, so there are no two runs to compare")
            raise JobError([fault], str(self.job))
        growing = self.with_ranks_by_cost(job, ranks)
        if not job.is_adaptive:
            self.twin_of(job, ranks)
        return growing

    def load_twin(self, ranks: Ranks, overrides: dict[str, Any]) -> Job:
        """Return the twin of the job; for an adaptive job, of the schedule that its run has decided."""
        from hvd_batchgrow.schedule.adaptive.decisions import read_decisions

        job = self.load(overrides)
        decisions = read_decisions(self.runs_dir / job.name / "decisions.jsonl")[1] if job.is_adaptive else ()
        return self.twin_of(job, ranks, decisions)

    def twin_of(self, job: Job, ranks: Ranks, decisions: Sequence[Decision] = ()) -> Job:
        """Return the twin of a job with the ranks that `plan` prints: all of them, or those of each phase filled in."""
        from hvd_batchgrow.data.source_checks import known_num_samples
        from hvd_batchgrow.schedule.cost.cost_file import load_cost_file
        from hvd_batchgrow.slurm.chain_jobs import with_ranks_per_phase

        figures = None if self.cost is None else load_cost_file(self.cost)
        plan = plan_twin(job, ranks.size, known_num_samples(job.data), figures, decisions)
        if any(layout.ranks != ranks.size for layout in plan.layouts):
            return with_ranks_per_phase(plan)
        return plan.job.model_copy(update={"layout": plan.job.layout.grown_by("accumulation")})

    def train_pairs(self, ranks: Ranks, stop: StopRequest, overrides: dict[str, Any]) -> ExitCode:
        """Train both runs of each seed, one after the other, and print the comparison; a stop ends the command."""
        from hvd_batchgrow.train.run.restart import agents_of, is_restart

        stop.connecting = False
        commands = ranks.run_on_all(lambda: self.of_each_seed(overrides))
        folders = [self.runs_dir / f"{name}{suffix}" for name in commands for suffix in ("", "-twin")]
        if self.seeds > 1 and self.resume == "never" and not self.overwrite:
            agents = agents_of(ranks)
            ranks.run_on_rank0(lambda: _refuse_existing([each for each in folders if not is_restart(each, agents)]))
        ended: list[RunEnded] = []
        for index, folder in enumerate(folders):
            if index and ranks.any(flag=stop.stop_requested):
                return ExitCode.STOPPED
            command = commands[folder.name.removesuffix("-twin")]
            load = partial(command.load_twin if index % 2 else command.load_growing, ranks, overrides)
            if self.seeds > 1 and self.resume == "auto" and _is_finished(folder, ranks, load):
                continue
            alone = replace(self, replay=None) if index % 2 else self  # a twin's schedule is fixed
            ended.append(alone.train(ranks, stop, load))
            if not ended[-1].done:
                return ExitCode.STOPPED
        ranks.run_on_rank0(lambda: self.print_results(folders, ended))
        return ExitCode.DONE

    def of_each_seed(self, overrides: dict[str, Any]) -> dict[str, TwinCommand]:
        """Return a command for each pair by the name of its growing run; a single pair has the name of the job."""
        job = self.read(overrides)
        if self.seeds == 1:
            return {job.name: self}
        names = {f"{job.name}-seed{seed}": seed for seed in range(job.seed, job.seed + self.seeds)}
        return {name: replace(self, seed=seed, name=name) for name, seed in names.items()}

    def print_results(self, folders: Sequence[Path], ended: Sequence[RunEnded]) -> None:
        """Print the run folders and the comparison of the pairs."""
        from hvd_batchgrow.cli.compare import print_pairs
        from hvd_batchgrow.observers.console_tables import print_table, result_table

        console = terminal(sys.stdout)
        if self.seeds == 1:
            names = ("grow the batch", "decay the learning rate")
            print_table(console, result_table(list(zip(names, ended, strict=True))))
        for folder in folders:
            console.print(f"run folder: {folder}", soft_wrap=True)
        curves = shlex.join(["tensorboard", "--host", "localhost", "--logdir", str(self.runs_dir)])
        console.print(f"curves: {curves}", soft_wrap=True)
        print_pairs(console, folders, self.margin, with_costs=self.seeds > 1)


def _after_signal(code: ExitCode, stop: StopRequest) -> ExitCode:
    """Return the exit code of a rank; if the run was stopped under torchrun, wait for its SIGTERM first.

    A rank that ends before the signal counts as a failure and uses up a restart (`--max-restarts`).
    """
    if code == ExitCode.STOPPED and restarts_ranks(os.environ):
        stop.wait(_SIGNAL_WAIT_S)
    return code


def _refuse_existing(folders: Sequence[Path]) -> None:
    """Raise RunError if one of the runs exists, before the others are trained."""
    if found := [str(folder) for folder in folders if (folder / "job.toml").exists()]:
        have = "holds a run" if len(found) == 1 else "hold runs"
        fault = f"{', '.join(found)} {have} already: add --resume auto to keep and finish them"
        raise RunError(f"{fault}, --overwrite to replace them, or --name NAME for new ones")


def _is_finished(folder: Path, ranks: Ranks, load: Callable[[], Job]) -> bool:
    """Return whether a folder holds the finished run of a job; equal on all ranks, and rank 0 reports it."""
    from hvd_batchgrow.results.confounds import changed_keys
    from hvd_batchgrow.results.run_files import RunFiles, error_of
    from hvd_batchgrow.train.checkpoints.checkpoint import checkpoint_samples

    def find() -> bool:
        try:
            run = RunFiles.read(folder)
        except RunError:
            return False  # not trained yet, or damaged; training reports damage
        if error_of(run.attempts):
            return False  # such as an evaluation at the end that failed
        # The record may be ahead of the last checkpoint, if the process was killed between them.
        if not run.is_finished or checkpoint_samples(folder / "checkpoints") != run.samples:
            return False
        job = load()
        changed = changed_keys(run.job, job.model_dump(mode="json", exclude_none=True))
        return run.seed == job.seed and not changed

    found = ranks.run_on_rank0(find)
    if found:
        print(f"{folder} is finished", file=sys.stderr)
    return ranks.any(flag=bool(found))


def run_observers(job: Job, console: PlainConsole, stack: ExitStack) -> list[Observer]:
    """Return the observers of a run: its progress on the console, its files, and those that the job names.

    Args:
        job: the job.
        console: for the progress.
        stack: closes the live view, also after an error.
    """
    from hvd_batchgrow.observers.attempt_times import AttemptTimes
    from hvd_batchgrow.observers.metrics import BranchesFile, ConsumedFile, MetricsFile
    from hvd_batchgrow.observers.outcomes import OutcomesFile
    from hvd_batchgrow.observers.progress import ProgressDisplay

    display = ProgressDisplay(console, job.logging.line_every_s)
    stack.callback(display.close)  # also after an error: a live view hides the cursor
    files: list[Observer] = [MetricsFile(), ConsumedFile(), OutcomesFile(), BranchesFile(), AttemptTimes()]
    observers = [*files, display]
    if job.logging.tensorboard:
        from hvd_batchgrow.observers.tensorboard import TensorBoard

        observers.append(TensorBoard())
    if job.logging.observers:
        from hvd_batchgrow.observers.load_observers import load_observers

        observers += load_observers(job.logging.observers, lambda line: console.print(line, soft_wrap=True))
    return observers


def _exit_code(runs: Sequence[RunEnded]) -> ExitCode:
    return ExitCode.DONE if all(run.done for run in runs) else ExitCode.STOPPED
