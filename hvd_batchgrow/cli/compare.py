"""`hvd-batchgrow compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from hvd_batchgrow.cli.common import refuse_overrides, terminal
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.observers.console import PlainConsole

if TYPE_CHECKING:
    from hvd_batchgrow.results.run_files import RunFiles

Margin = Annotated[float, Field(gt=0, lt=1e9)]


@dataclass(frozen=True)
class CompareCommand:
    """State whether jobs reach the same results, from runs of the same seeds."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders of runs. Runs of one job apart from the seed belong together, and each job is compared
    with that of the first run."""
    margin: Margin | None = None
    """Largest difference of the results that does not matter: in percentage points for accuracy, otherwise in the unit
    of the metric. None: no statement on equivalence."""
    metric: str | None = None
    """The result to compare. None: the first metric of the task, or the loss without one."""
    dataset: Literal["test", "validation"] = "test"
    """The set on which the runs were evaluated at their end."""
    json: bool = False
    """Print one JSON object per comparison, on one line."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout; report damaged runs on stderr, and then return 1."""
        from hvd_batchgrow.observers.comparison_tables import comparison_tree, print_comparison
        from hvd_batchgrow.results.comparison import compare_runs
        from hvd_batchgrow.storage.strict_json import dump_json

        refuse_overrides(overrides)
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


def read_runs(folders: Sequence[Path]) -> tuple[list[RunFiles], list[str]]:
    """Return the runs in some folders, each once, and a sentence for each run that cannot be read.

    Raises:
        RunError: a folder does not exist, or contains no run.
    """
    from hvd_batchgrow.results.run_files import RunFiles
    from hvd_batchgrow.results.run_summary import find_runs

    paths = {path.resolve(): path for folder in folders for path in find_runs(folder)}
    runs, faults = list[RunFiles](), list[str]()
    for path in paths.values():
        try:
            runs.append(RunFiles.read(path))
        except RunError as error:
            faults.append(str(error))
    return runs, faults


def print_pairs(console: PlainConsole, folders: Sequence[Path], margin: float | None, *, with_costs: bool) -> None:
    """Print the comparison of a job's runs with their twins.

    Args:
        console: the console.
        folders: of the job's runs and their twins, alternately.
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
