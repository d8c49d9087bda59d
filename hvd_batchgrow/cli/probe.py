"""`hvd-batchgrow probe`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from hvd_batchgrow.cli.common import RanksCommand, terminal, with_ranks
from hvd_batchgrow.messages.errors import ExitCode

if TYPE_CHECKING:
    from hvd_batchgrow.comm.ranks import Ranks


@dataclass(frozen=True)
class ProbeCommand(RanksCommand):
    """Measure what updates of a job cost on the ranks that are launched, for `plan --cost`."""

    out: Path = Path("PROBE.json")
    """The figures go in here, beside those of other numbers of ranks."""
    budget_s: Annotated[float, Field(gt=0, le=86_400)] = 25.0
    """About how long to measure; longer is steadier where the machine is shared."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Measure, and say what to do with it."""
        return with_ranks(lambda ranks: self.probe(ranks, overrides), self.backend)

    def probe(self, ranks: Ranks, overrides: dict[str, Any]) -> ExitCode:
        """All ranks together."""
        from hvd_batchgrow.observers.progress import work_progress
        from hvd_batchgrow.train.probe import probe_into

        console = terminal(sys.stderr, quiet=ranks.rank != 0)
        with work_progress(console) as report:
            probe_into(self.out, lambda: self.load(overrides), ranks, report, console.print, self.budget_s)
        job = self.words(overrides)
        words = ["hvd-batchgrow", "plan", *job, "--ranks", str(ranks.size), "--cost", str(self.out)]
        console.print(f"written to {self.out}: {shlex.join(words)}", soft_wrap=True)
        return ExitCode.DONE
