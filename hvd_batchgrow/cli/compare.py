"""`hvd-batchgrow compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hvd_batchgrow.cli.common import refuse_overrides, terminal
from hvd_batchgrow.config.types import Margin
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError
from hvd_batchgrow.observers.console import PlainConsole


@dataclass(frozen=True)
class CompareCommand:
    """Compare the results of jobs in pairs of runs with the same seed, and state whether they are equivalent."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders of runs. Runs that differ only in the seed form an arm. Each arm is compared with the arm
    of the first run."""
    margin: Margin | None = None
    """Largest difference of the results that does not matter: percentage points for accuracy, otherwise the unit of the
    metric. None: do not test equivalence."""
    metric: str | None = None
    """Metric to compare. None: the first metric of the task; the loss if the task has no metric."""
    dataset: Literal["test", "validation"] = "test"
    """Set of the final evaluation whose results are compared."""
    json: bool = False
    """Print one JSON object per comparison, one per line."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout; report damaged runs on stderr, and then return 1."""
        from hvd_batchgrow.observers.comparison_tables import comparison_tree, print_comparison
        from hvd_batchgrow.results.comparison import compare_runs
        from hvd_batchgrow.results.run_summary import read_runs
        from hvd_batchgrow.storage.strict_json import dump_json

        refuse_overrides(overrides)
        if not self.folders:
            fault = "name the folders of at least two runs, or a folder of runs such as runs"
            raise JobError([Fault("FOLDERS", fault)], "command line")
        runs, faults = read_runs(self.folders)
        for fault in faults:
            print(fault, file=sys.stderr)
        console = terminal(sys.stdout)
        for index, found in enumerate(compare_runs(runs, self.margin, self.metric, self.dataset)):
            if self.json:
                print(dump_json(comparison_tree(found)))
                continue
            if index:
                console.print()
            print_comparison(console, found)
        return ExitCode.FAILURE if faults or any(run.faults for run in runs) else ExitCode.DONE


def print_pairs(console: PlainConsole, folders: Sequence[Path], margin: float | None, *, with_costs: bool) -> None:
    """Print the comparison of a job's runs with their twins.

    Args:
        console: the console.
        folders: the job's runs and their twins, alternately.
        margin: see `CompareCommand`.
        with_costs: whether to print the costs of both arms too.

    Raises:
        RunError: a run cannot be read.
    """
    from hvd_batchgrow.observers.comparison_tables import print_comparison
    from hvd_batchgrow.results.comparison import compare_runs
    from hvd_batchgrow.results.run_files import RunFiles

    for found in compare_runs([RunFiles.read(folder) for folder in folders], margin):
        print_comparison(console, found, with_costs=with_costs)
