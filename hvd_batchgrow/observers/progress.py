"""Progress of a run: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite

from rich.progress import BarColumn, Progress, TaskID

from hvd_batchgrow.comm.launcher_env import restarts_ranks
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.wording import amount, counted, listed
from hvd_batchgrow.observers.console import BAR, NOTE, AmountColumn, PlainConsole, description_column
from hvd_batchgrow.observers.console_tables import print_plan
from hvd_batchgrow.observers.live_display import LiveDisplay, can_draw
from hvd_batchgrow.observers.metrics import evaluation_record, record_line
from hvd_batchgrow.observers.progress_lines import RecentRecords, evaluation_line, phase_line, progress_line
from hvd_batchgrow.results.live_plan import LivePlan
from hvd_batchgrow.results.live_state import LiveState
from hvd_batchgrow.results.record_lines import EvaluationLine, TrainLine
from hvd_batchgrow.results.run_summary import command
from hvd_batchgrow.storage.json_lines import Line, read_json_lines
from hvd_batchgrow.train.events import (
    BranchesCompared,
    BranchStarted,
    Decided,
    Evaluation,
    Observer,
    RunEnded,
    RunStarted,
    TrainRecord,
)


class ProgressDisplay(Observer):
    """Prints what will run, its progress, and its result.

    Args:
        console: a terminal gets a live view; another stream gets progress lines.
        line_every_s: seconds between two lines.
        clock: returns seconds; for tests.
    """

    def __init__(
        self, console: PlainConsole, line_every_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self._line_every_s, self._clock = console, line_every_s, clock
        self._live: LiveDisplay | None = None
        self._recent = RecentRecords()
        """The records since the last evaluation."""
        self._phase = -1
        self._num_ranks = 1

    def on_start(self, event: RunStarted) -> None:
        """Print the plan and the machine, and start a live view on a terminal."""
        self._num_ranks, plan = event.ranks, event.plan
        print_plan(self.console, plan)
        for line in _machine_lines(event):
            self.console.paragraph(line)
        for note in event.notes:
            self.console.paragraph(note, NOTE)
        if event.samples:
            total = plan.schedule.end_samples
            self.console.paragraph(f"resumed at {event.samples:,} of {total:,} samples")
        self._state = LiveState(LivePlan.of(plan.to_dict()), event.samples)
        for earlier in _earlier_lines(event):
            self._state.add(earlier, measures_time=False)
        self._state.begin(self._clock(), plan.schedule.updates_at(event.samples))
        self._printed_at = self._clock()
        if can_draw(self.console):
            self._live = LiveDisplay(self.console, self._state.view(), self._clock)
            self._live.start()

    def on_record(self, event: TrainRecord) -> None:
        """Print a line with the first record of a phase. Update the live view, or print a line if one is due."""
        line, before, now = record_line(event), self._state.samples, self._clock()
        record = TrainLine.of(line, self._state.plan.metric)
        self._recent.add(record, event.samples - before)
        self._state.add(line, now)
        if event.phase != self._phase:
            self.console.paragraph(phase_line(record, self._num_ranks))
        self._phase = event.phase
        if self._live:
            self._live.show(self._state.view())
        elif now - self._printed_at >= self._line_every_s:
            self._printed_at = now
            self.console.paragraph(progress_line(self._state.view()))

    def on_evaluation(self, event: Evaluation) -> None:
        """Print a line for the evaluation."""
        line = evaluation_record(event)
        self.console.paragraph(evaluation_line(EvaluationLine.of(line), self._recent))
        if event.is_finite and (unknown := [name for name, value in event.named().items() if not isfinite(value)]):
            fault = "not a number: the task returned such a sum, or a count of 0"
            self.console.paragraph(f"{event.dataset} {listed(unknown)} at sample {event.samples:,}: {fault}", NOTE)
        self._state.add(line)
        self._recent = RecentRecords()
        self._printed_at = self._clock()
        if self._live:
            self._live.show(self._state.view())

    def on_decision(self, event: Decided) -> None:
        """Print what the decision changes, and why."""
        self._state.replan(LivePlan.of(event.plan.to_dict()))
        self.console.paragraph(f"sample {event.decision.samples:,}: {event.decision.describe()}")

    def on_branch(self, event: BranchStarted) -> None:
        """Print which branch is trained; the live view shows it until the result."""
        self.console.paragraph(event.describe())
        if self._live:
            self._live.show(self._state.view(event.describe()))

    def on_branches(self, event: BranchesCompared) -> None:
        """Print what the branches have shown."""
        self.console.paragraph(event.describe())
        if self._live:
            self._live.show(self._state.view())

    def on_end(self, event: RunEnded) -> None:
        """Print the result and, after a stop, how to resume."""
        self.close()
        all_done = event.updates == event.num_updates
        updates = f"{event.updates:,} of {event.num_updates:,} updates, {event.samples:,} samples"
        how = f"{updates} in {event.elapsed_s:.0f} s"
        if event.done:
            result = f"{'done' if all_done else 'these phases are done'}: {how}"
        else:
            saved = "" if event.lost_ranks else " (a checkpoint is saved)"
            result = f"stopped after {how}{saved}: {_how_to_continue(event)}"
        self.console.paragraph(f"{event.job_name}: {result}")
        if event.best:
            self.console.paragraph(event.best)
        if event.replay_checks:
            self.console.paragraph(event.replay_checks)

    def close(self) -> None:
        """Remove the live view, if there is one."""
        if self._live:
            self._live.close()
            self._live = None


def _how_to_continue(event: RunEnded) -> str:
    if event.lost_ranks:
        return "ranks were lost; the run continues without them"
    if restarts_ranks(os.environ):
        return "ranks join or leave, or the job ends; the run continues when torchrun starts the ranks again"
    return f"the same command with --name {event.job_name} --resume auto, and without --fork or --overwrite, continues"


def _earlier_lines(event: RunStarted) -> list[Line]:
    """Return the records of earlier invocations; an empty list if they cannot be read."""
    if not event.samples:
        return []
    try:
        lines = read_json_lines(event.folder / "metrics.jsonl", lambda _: False)
    except RunError:
        return []  # the observer that writes the file reports it
    return [line for line in lines if line["samples"] <= event.samples]


_BACKENDS = {
    "single": "without a launcher",
    "horovod-mpi": "by Horovod over MPI",
    "horovod-gloo": "by Horovod over Gloo",
    "torch-gloo": "by torch.distributed",
    "torch-nccl": "by torch.distributed",
}
"""`Ranks.backend` in words."""


def _machine_lines(event: RunStarted) -> list[str]:
    """Return what the run trains on."""
    hardware, hosts, each = event.hardware, event.hardware.gpus_per_host, " each" if event.ranks > 1 else ""
    fewest = f"{min(hosts)} to " if min(hosts) < max(hosts) else ""
    used = f", {fewest}{counted(max(hosts), 'GPU')} per host" if hardware.is_cuda else ""
    driver = f" {hardware.driver}" if hardware.driver else ""
    cudnn = f", cuDNN {hardware.cudnn}" if hardware.cudnn else ""
    sums = f"; {hardware.collectives} sums gradients" if hardware.collectives else ""
    frozen = f", {event.num_frozen:,} of them frozen" if event.num_frozen else ""
    return [
        f"network: {counted(event.num_parameters, 'parameter')}{frozen}",
        *event.groups,
        f"device: {hardware.device}{used}",
        *([f"CUDA {hardware.cuda}{cudnn}, driver{driver} (up to CUDA {hardware.driver_cuda})"] * hardware.is_cuda),
        f"ranks: {event.ranks:,} on {counted(len(hosts), 'host')} {_BACKENDS.get(event.backend, event.backend)}{sums}",
        f"{counted(event.threads_per_rank, 'thread')}{each}, pixels by {event.pipeline}",
        f"run folder {event.folder}",
        f"to follow the run from another terminal: {command('watch', event.folder)}",
    ]


@contextmanager
def work_progress(console: PlainConsole) -> Iterator[ReportProgress]:
    """Show the progress of downloads and indexing: bars on a terminal, elsewhere a line every 30 s."""
    columns = (description_column(), BarColumn(complete_style=BAR, finished_style=BAR), AmountColumn())
    bars = Progress(*columns, console=console, disable=not can_draw(console))
    tasks: dict[str, TaskID] = {}
    finished: set[str] = set()
    printed_at = 0.0

    def report(what: str, done: int, total: int, unit: str = "bytes", /) -> None:
        nonlocal printed_at
        is_new, now = what not in tasks, time.monotonic()
        if is_new:
            tasks[what] = bars.add_task(what, total=total or None, unit=unit)
            bars.start()
        bars.update(tasks[what], completed=done)
        is_done = 0 < total <= done
        if bars.disable and what not in finished and (is_new or is_done or now > printed_at + 30):
            printed_at = now
            console.paragraph(f"{what}: {'done, ' * is_done}{amount(done, 0 if is_done else total, unit)}")
        if is_done:
            finished.add(what)
            bars.stop()

    try:
        yield report
    finally:
        bars.stop()
