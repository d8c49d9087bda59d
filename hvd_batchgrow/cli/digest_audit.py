"""`hvd-batchgrow digest` and `audit`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from hvd_batchgrow.cli.common import refuse_overrides, terminal
from hvd_batchgrow.messages.errors import ExitCode


@dataclass(frozen=True)
class DigestCommand:
    """Print a SHA-256 of the weights and buffers of a run, and how the weights of several runs differ."""

    first: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Further run folders, each compared with the first."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print the digest alone for one run, or one line per run for several."""
        from hvd_batchgrow.verification.digest import compare_weights, final_weights

        refuse_overrides(overrides)
        first, *others = (final_weights(run) for run in (self.first, *self.others))
        for weights in (first, *others):
            for reason in weights.skipped:
                print(f"skipped a checkpoint: {reason}", file=sys.stderr)
            if not weights.is_final:
                print(f"{weights.run} is not finished: using its weights at sample {weights.samples}", file=sys.stderr)
        if not others:
            print(first.digest)
            return ExitCode.DONE
        print(f"{first.digest}  {first.run}")
        for other in others:
            print(f"{other.digest}  {other.run}  {compare_weights(first, other)}")
        return ExitCode.DONE


@dataclass(frozen=True)
class AuditCommand:
    """Check from a run's record that each sample was used once per epoch, and compare the sample orders of runs."""

    first: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Further run folders, each audited, and its sample order compared with the first's."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print a table per run; return 1 if a sample was repeated, skipped or out of order, or two runs differ."""
        from hvd_batchgrow.observers.console_tables import audit_table, print_table
        from hvd_batchgrow.observers.progress import work_progress
        from hvd_batchgrow.verification.audit import audit, compare_orders, read_consumed

        refuse_overrides(overrides)
        console = terminal(sys.stdout)
        with work_progress(terminal(sys.stderr)) as report:
            audits = [audit(read_consumed(run), report) for run in (self.first, *self.others)]
        for result in audits:
            print_table(console, audit_table(result))
        orders = [compare_orders(audits[0].consumed, other.consumed) for other in audits[1:]]
        for _, line in orders:
            console.print(line, soft_wrap=True)
        passed = all(result.passed for result in audits) and all(is_same for is_same, _ in orders)
        return ExitCode.DONE if passed else ExitCode.FAILURE
