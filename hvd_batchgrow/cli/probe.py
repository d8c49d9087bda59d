"""`hvd-batchgrow probe`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from hvd_batchgrow.cli.common import RanksCommand, terminal
from hvd_batchgrow.messages.errors import ExitCode

if TYPE_CHECKING:
    from hvd_batchgrow.comm.ranks import Ranks


@dataclass(frozen=True)
class ProbeCommand(RanksCommand):
    """Measure the time of a job's updates on the launched ranks, for `plan --cost`."""

    out: Path = Path("PROBE.json")
    """Output file; measurements for other numbers of ranks in it are kept."""
    budget_s: Annotated[float, Field(gt=0, le=86_400)] = 25.0
    """Approximate seconds to measure; a longer time is more reliable on a shared machine."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Measure on all ranks, and print the plan command that uses the result."""
        return self.with_ranks(lambda ranks: self.probe(ranks, overrides), overrides)

    def probe(self, ranks: Ranks, overrides: dict[str, Any]) -> ExitCode:
        """Measure and write the file; all ranks call it together."""
        from hvd_batchgrow.observers.progress import work_progress
        from hvd_batchgrow.train.probe import probe_into

        console = terminal(sys.stderr, quiet=ranks.rank != 0)
        with work_progress(console) as report:
            probe_into(self.out, lambda: self.load(overrides), ranks, report, console.print, self.budget_s)
        job = self.words(overrides)
        words = ["hvd-batchgrow", "plan", *job, "--ranks", str(ranks.size), "--cost", str(self.out)]
        console.print(f"{self.out} is written. To use it: {shlex.join(words)}", soft_wrap=True)
        return ExitCode.DONE
