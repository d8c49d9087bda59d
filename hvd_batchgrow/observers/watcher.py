"""Show a run that another process trains: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from hvd_batchgrow.messages.errors import ExitCode
from hvd_batchgrow.messages.wording import time_text
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.end_block import print_end_block
from hvd_batchgrow.observers.live_display import LiveDisplay, can_draw
from hvd_batchgrow.observers.progress_lines import RecentRecords, evaluation_line, phase_line, progress_line
from hvd_batchgrow.results.lock_watch import Holder, LockWatch
from hvd_batchgrow.results.record_lines import EvaluationLine
from hvd_batchgrow.results.records import number, printable
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_follower import CaughtUp, Event, NewRecord, RunFollower
from hvd_batchgrow.results.run_summary import FRESH_S, command, resume_command

POLL_S = 1.0
"""Seconds between two reads of the files."""
GRACE_S = 10.0
"""Seconds without a holder of the lock after which a run counts as stopped: an elastic job, or a loop in a shell,
starts the next invocation by then."""


class Watcher:
    """Follows a run until it has finished or stopped.

    Args:
        console: a terminal gets a live view; another stream gets progress lines.
        follower: of the run.
        lock: of the run.
        line_every_s: seconds between two progress lines; None: `logging.line_every_s` of the job.
        clock: returns seconds; for tests.
        sleep: waits for a number of seconds; for tests.
    """

    def __init__(
        self,
        console: PlainConsole,
        follower: RunFollower,
        lock: LockWatch,
        line_every_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.console, self.follower, self.lock = console, follower, lock
        self._line_every_s, self._clock, self._sleep = line_every_s, clock, sleep
        self._live: LiveDisplay | None = None
        self._recent = RecentRecords()
        self._phase = -1
        self._said = ""
        """The last line about the state of the run."""
        self._printed_at_s = clock()
        self._held_at_s: float | None = None
        """When the lock was last held; None: not held since the start of `watch`."""

    def run(self) -> ExitCode:
        """Follow the run; return DONE if it finishes, FAILURE if an error ends it, and STOPPED if nothing trains it."""
        try:
            while True:
                holder = self.lock.look()  # before the files, so that the last lines of the holder count
                for event in self.follower.poll():
                    self._handle(event)
                if (code := self._end(holder)) is not None:
                    return code
                self._say(holder)
                self._show(holder)
                self._sleep(POLL_S)
        finally:
            self._close()

    def _handle(self, event: Event) -> None:
        state = self.follower.state
        assert state is not None
        if isinstance(event, str):
            self.console.paragraph(event)
        elif isinstance(event, CaughtUp):
            self._catch_up(resumed=event.resumed)
        elif isinstance(event, EvaluationLine):
            self.console.paragraph(evaluation_line(event, self._recent))
            self._recent, self._printed_at_s = RecentRecords(), self._clock()
        else:
            self._handle_record(event)

    def _handle_record(self, event: NewRecord) -> None:
        self._recent.add(event.record, event.num_samples)
        if event.record.phase != self._phase:
            self._phase = event.record.phase
            self.console.paragraph(phase_line(event.record, event.record.ranks))
        if self._is_plain and self._clock() - self._printed_at_s >= self._every_s:
            self._print_progress()

    def _catch_up(self, *, resumed: bool) -> None:
        """Print the current state of the run, without repeating earlier lines."""
        state = self.follower.state
        assert state is not None
        view, self._recent = state.view(), RecentRecords()
        self._phase = -1 if view.record is None else view.record.phase
        if resumed:
            self.console.paragraph(f"{view.plan.name}: another invocation continues at sample {state.samples:,}")
        if self._is_plain and view.record is not None:
            self._print_progress()
            if view.last is not None:
                self.console.paragraph(f"last evaluation: {evaluation_line(view.last, self._recent)}")

    def _print_progress(self) -> None:
        assert self.follower.state is not None
        self._printed_at_s = self._clock()
        self.console.paragraph(progress_line(self.follower.state.view()))

    @property
    def _is_plain(self) -> bool:
        return not can_draw(self.console)

    @property
    def _every_s(self) -> float:
        if self._line_every_s is not None:
            return self._line_every_s
        section = self.follower.job.get("logging")
        found = number(section.get("line_every_s")) if isinstance(section, dict) else None
        return 60.0 if found is None else found

    @property
    def _name(self) -> str:
        return printable(str(self.follower.folder))

    def _end(self, holder: Holder) -> ExitCode | None:
        """Return the exit code if the run has finished or stopped, and print what happened; otherwise None."""
        now = self._clock()
        if holder.state == "held":
            self._held_at_s = now
        if holder.state == "free" and self.follower.state is None and self.follower.plan_fault:
            self.console.paragraph(self.follower.plan_fault)
            return ExitCode.FAILURE
        if holder.state in ("held", "unsure") or self.follower.state is None:
            return None
        error = self.follower.error()
        if self.follower.is_finished and not error:
            self._close()
            self.console.paragraph(f"{self._name}: finished")
            print_end_block(self.console, RunFiles.read(self.follower.folder))
            return ExitCode.DONE
        if holder.state == "free" and self._held_at_s is not None and now - self._held_at_s < GRACE_S:
            return None
        self._close()
        view = self.follower.state.view()
        why = "no process holds its lock"
        if holder.state == "silent":
            why = f"{holder.name} has not renewed its lock for {time_text(FRESH_S)}, so it was probably killed"
        where = f"epoch {view.epoch:.2f} of {view.plan.end_samples / view.plan.num_samples:.2f}"
        state, why = ("failed", error) if error else ("stopped", why)
        self.console.paragraph(f"{self._name}: {state} at {where} ({100 * view.run_share:.1f} %): {why}")
        if (self.follower.folder / "slurm").exists():
            self.console.paragraph(f"jobs of its chain: {command('status', self.follower.folder)}")
        when = " after the cause is fixed" if error else ""
        self.console.paragraph(f"to resume{when}: {resume_command(self.follower.folder)}")
        return ExitCode.FAILURE if error else ExitCode.STOPPED

    def _say(self, holder: Holder) -> None:
        """Print the state of the run if it has changed and no live view shows it."""
        if self.follower.state is None:
            text = f"{self._name}: waiting for the run to start: it has no plan.json yet"
        elif holder.state == "unsure":
            text = f"{self._name}: waiting up to {time_text(FRESH_S)} to see whether {holder.name} still trains it"
        else:
            text = f"{self._name}: {_state_text(holder)}" if self._is_plain else ""
        if text and text != self._said:
            self.console.paragraph(text)
        self._said = text

    def _show(self, holder: Holder) -> None:
        if self._is_plain or self.follower.state is None:
            return
        view = self.follower.state.view(_state_text(holder))
        if self._live is None:
            self._live = LiveDisplay(self.console, view, self._clock)
            self._live.start()
        self._live.show(view)

    def _close(self) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None


def _state_text(holder: Holder) -> str:
    return "no process holds the lock" if holder.state == "free" else f"trained by {holder.name}"
