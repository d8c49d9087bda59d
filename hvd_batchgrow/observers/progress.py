"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TimeRemainingColumn

from hvd_batchgrow.data.datasets.dataset import ReportProgress
from hvd_batchgrow.messages.wording import counted, metric_texts, short_time
from hvd_batchgrow.observers.console import PlainConsole, description_column, field_column
from hvd_batchgrow.observers.console_tables import print_plan
from hvd_batchgrow.schedule.cost.time_left import TimeLeft
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.events import Decided, Evaluation, Observer, RunEnded, RunStarted, TrainRecord


class ProgressDisplay(Observer):
    """Prints what will run, its progress, and its result.

    Args:
        console: a terminal gets a bar; another stream gets a line every so often.
        line_every_s: seconds between two lines.
        clock: returns seconds; for tests.
    """

    def __init__(
        self, console: PlainConsole, line_every_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self._line_every_s, self._clock = console, line_every_s, clock
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._recent = _Recent()
        """The records since the last evaluation."""
        self._phase = -1
        self._num_ranks = 1
        self._plan: Plan | None = None
        self._time_left = TimeLeft()
        self._samples = self._updates = 0
        """Of the last record."""
        self._begin = self._printed_at = clock()
        self._update_s = 0.0
        """Seconds that updates have taken since the start."""

    def on_start(self, event: RunStarted) -> None:
        """Print the plan and the machine, and start a bar on a terminal."""
        self._num_ranks, self._plan, self._samples = event.ranks, event.plan, event.samples
        self._updates = event.plan.schedule.updates_at(event.samples)
        print_plan(self.console, event.plan)
        for line in _machine_lines(event):
            self.console.print(line, soft_wrap=True)
        for note in event.notes:
            self.console.print(note, style="yellow", soft_wrap=True)
        total = event.plan.schedule.end_samples
        if event.samples:
            self.console.print(f"resumed at {event.samples:,} of {total:,} samples", highlight=False)
        if self.console.is_terminal:
            columns = (description_column(), BarColumn(bar_width=None), TaskProgressColumn(), field_column("left"))
            self._progress = Progress(*columns, console=self.console, expand=True)
            self._task = self._progress.add_task("starting", total=total, completed=event.samples, left="")
            self._progress.start()
        self._begin = self._printed_at = self._clock()

    def on_record(self, event: TrainRecord) -> None:
        """Print the start of each phase; advance the bar or, without a bar, print a line if one is due."""
        num_samples = event.samples - self._samples
        self._recent.add(event, num_samples)
        if num_samples and event.samples_per_s > 0:
            seconds = num_samples / event.samples_per_s
            self._time_left.add(event.global_batch / event.ranks, event.updates - self._updates, seconds)
            self._update_s += seconds
        self._samples, self._updates = event.samples, event.updates
        if event.phase != self._phase:
            some = f" on {event.ranks} of {self._num_ranks} ranks" if event.ranks < self._num_ranks else ""
            self.console.print(
                f"phase {event.phase + 1}: global batch {event.global_batch}{some}, lr {event.lr:.5g}", highlight=False
            )
        self._phase = event.phase
        if self._progress:
            # Short enough for 80 columns. The line of each evaluation has the rest.
            text = f"epoch {event.epoch:.2f}, B {event.global_batch}, lr {event.lr:.4g}, loss {event.loss:.4f}"
            self._progress.update(self._task, completed=event.samples, description=text, left=self._left())
        elif self._clock() - self._printed_at >= self._line_every_s:
            self._printed_at = self._clock()
            self.console.print(f"{self._done()}: epoch {event.epoch:.2f}, {_line(event)}; {self._left()}")

    def _done(self) -> str:
        assert self._plan is not None
        return f"{100 * self._samples / self._plan.schedule.end_samples:.1f} %"

    def _left(self) -> str:
        """Return the time that is left, with evaluations and checkpoints as in the time so far; empty if unknown."""
        assert self._plan is not None
        found = self._time_left.seconds(self._plan, self._samples)
        if found is None:
            return ""
        slowdown = max(1.0, (self._clock() - self._begin) / self._update_s)
        phase_s, run_s = (slowdown * seconds for seconds in found)
        is_last = len(self._plan.schedule.phases) == self._phase + 1
        phase = "" if is_last or self._progress else f"{short_time(phase_s)} in this phase, "
        return f"{phase}{short_time(run_s)} left"

    def on_evaluation(self, event: Evaluation) -> None:
        """Print a line for the evaluation."""
        train = f"{_line(mean)}, " if (mean := self._recent.mean()) else ""
        self.console.print(
            f"epoch {event.epoch:.2f}: {train}{event.dataset} loss {event.loss:.4f}"
            + "".join(f", {event.dataset} {text}" for text in metric_texts(event.metrics))
            + "".join(f", {text} of averaged weights" for text in metric_texts(event.average_metrics)),
            highlight=False,
        )
        self._recent = _Recent()
        self._printed_at = self._clock()

    def on_decision(self, event: Decided) -> None:
        """Print what the decision changes, and why."""
        self._plan = event.plan
        self.console.print(f"sample {event.decision.samples:,}: {event.decision.describe()}", highlight=False)
        if self._progress:
            self._progress.update(self._task, total=event.plan.schedule.end_samples)

    def on_end(self, event: RunEnded) -> None:
        """Print the result and, after a stop, how to resume."""
        self.close()
        all_done = event.updates == event.num_updates
        updates = f"{event.updates:,} of {event.num_updates:,} updates, {event.samples:,} samples"
        how = f"{updates} in {event.elapsed_s:.0f} s"
        if event.done:
            result = f"{'done' if all_done else 'these phases are done'}: {how}"
        else:
            result = f"stopped after {how} (a checkpoint is saved): the same command with --resume auto continues"
        self.console.print(f"{event.job_name}: {result}", highlight=False, soft_wrap=True)
        if event.best:
            self.console.print(event.best, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self._progress:
            self._progress.stop()


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
    ]


class _Recent:
    """Records in a row."""

    def __init__(self) -> None:
        self._last: TrainRecord | None = None
        self._samples = 0
        self._loss = self._seconds = 0.0

    def add(self, record: TrainRecord, num_samples: int) -> None:
        """Add a record of so many samples."""
        self._last = record
        self._samples += num_samples
        self._loss += record.loss * num_samples
        self._seconds += num_samples / record.samples_per_s if record.samples_per_s > 0 else 0.0

    def mean(self) -> TrainRecord | None:
        """Return the last record with the mean loss and the samples per second of all; None without records."""
        if self._last is None or not self._samples or not self._seconds:
            return self._last
        loss, speed = self._loss / self._samples, self._samples / self._seconds
        return replace(self._last, loss=loss, samples_per_s=speed)


def _line(record: TrainRecord) -> str:
    return (
        f"B {record.global_batch}, lr {record.lr:.4g}, loss {record.loss:.4f}, "
        f"{record.samples_per_s:,.0f} samples/s, all-reduce {record.allreduce_pct:.1f} %"
        + (f", {record.progress_epochs:.2f} epochs of progress" if record.progress_epochs != record.epoch else "")
        + (f", {record.skipped} updates skipped" if record.skipped else "")
    )


@contextmanager
def work_progress(console: PlainConsole) -> Iterator[ReportProgress]:
    """Show the progress of downloads and indexing: bars on a terminal, elsewhere a line every 30 s."""
    columns = (description_column(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}
    finished: set[str] = set()
    printed_at = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal printed_at
        is_new, now = what not in tasks, time.monotonic()
        if is_new:
            tasks[what] = bars.add_task(what, total=total or None)
            bars.start()
        bars.update(tasks[what], completed=done)
        is_done = 0 < total <= done
        if not console.is_terminal and what not in finished and (is_new or is_done or now > printed_at + 30):
            printed_at = now
            console.print(f"{what}: {f'done, {total:,}' if is_done else f'{done:,} of {total:,}'}", highlight=False)
        if is_done:
            finished.add(what)
            bars.stop()

    try:
        yield report
    finally:
        bars.stop()
