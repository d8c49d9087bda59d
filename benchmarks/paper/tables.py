"""Tables of the studies, from the records that are kept."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.paper.kept_files import ENDING, unpack
from benchmarks.paper.studies.study import Arm, Study, Table
from hvd_batchgrow.results.comparison import final_result
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.statistics import PairedDifference, equivalence, paired_difference

Runs = Mapping[tuple[str, int], RunFiles]
"""Runs by the name without the seed, such as `grow` or `grow-twin`, and the seed."""


def read_runs(study: Study, results: Path) -> Runs:
    """Return the runs of a study that are kept."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in study.arms:
            for seed in study.seeds_of(arm):
                for ending in ("", "-twin"):
                    packed = results / study.name / f"{arm.name}-seed{seed}{ending}{ENDING}"
                    if packed.exists():
                        found[arm.name + ending, seed] = RunFiles.read(unpack(packed, Path(folder)))
    return found


def markdown(table: Table, runs: Runs) -> str:
    """Return a table with a row for each arm that has runs.

    Differences are in percentage points of accuracy, between runs of the same seed, with a 95 % t interval. With a
    margin, the 90 % interval of two one-sided tests at 5 % follows in brackets if it lies within the margin.
    """
    reference = table.arms[0].name
    head = ["job", "n", "batch (first seed)", "updates", f"{table.dataset} accuracy", f"minus `{reference}`"]
    if any(arm.has_twin for arm in table.arms):
        head += ["twin's updates", "twin's accuracy", "minus twin"]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---' * (len(head) - 1)}|"]
    for arm in table.arms:
        seeds = [seed for seed in table.study.seeds_of(arm) if (arm.name, seed) in runs]
        if seeds:
            lines.append(f"| {' | '.join(_row(table, arm, seeds, runs, len(head)))} |")
    return "\n".join(lines)


def _row(table: Table, arm: Arm, seeds: Sequence[int], runs: Runs, columns: int) -> list[str]:
    reference, twin = table.arms[0].name, f"{arm.name}-twin"
    cells = [
        f"`{arm.name}`",
        str(len(seeds)),
        _batches(runs[arm.name, seeds[0]]),
        *_results(table, runs, arm.name, seeds),
        "" if arm.name == reference else _difference(table, runs, arm.name, reference, seeds),
    ]
    if columns > len(cells) and arm.has_twin:
        cells += [*_results(table, runs, twin, seeds), _difference(table, runs, arm.name, twin, seeds)]
    return cells + [""] * (columns - len(cells))


def _results(table: Table, runs: Runs, name: str, seeds: Sequence[int]) -> list[str]:
    """Return the mean updates and the mean accuracy of the runs of an arm."""
    found = [runs[name, seed] for seed in seeds]
    return [
        f"{statistics.fmean(run.updates for run in found):,.0f}",
        f"{statistics.fmean(accuracy(run, table.dataset) for run in found):.2f} %",
    ]


def _difference(table: Table, runs: Runs, name: str, other: str, seeds: Sequence[int]) -> str:
    pairs = [(runs[name, seed], runs[other, seed]) for seed in seeds if (other, seed) in runs]
    if not pairs:
        return ""
    found = [accuracy(one, table.dataset) - accuracy(two, table.dataset) for one, two in pairs]
    text = interval_text(paired_difference(found))
    if table.margin is not None and equivalence(found, table.margin).is_equivalent:
        text += f", within ±{table.margin:g}"
    return text


def accuracy(run: RunFiles, dataset: str) -> float:
    """Return the accuracy at the end of a run, in percent. Raises ValueError if it has not been measured."""
    found = final_result(run, "top1", dataset)
    if found is None:
        raise ValueError(f"{run.name} has no accuracy on the {dataset} set at its end")
    return 100 * found


def _batches(run: RunFiles) -> str:
    """Return the batches of a run: all if they are few, else the first, the last and how often the batch grew."""
    batches = [phase["global_batch"] for phase in run.plan["phases"]]
    grown = [b for b, before in zip(batches, [0, *batches], strict=False) if b != before]
    if len(grown) <= 4:
        return " → ".join(f"{batch:,}" for batch in grown)
    return f"{grown[0]:,} → {grown[-1]:,} in {len(grown) - 1} steps"


def interval_text(difference: PairedDifference) -> str:
    """Return the mean of differences with its interval, if there is one."""
    text = f"{difference.mean:+.2f}"
    if difference.low is not None and difference.high is not None:
        text += f" ({difference.low:+.2f} to {difference.high:+.2f})"
    return text.replace("-", "−")


def replace_table(page: str, name: str, table: str) -> str:
    """Return a page in which a table replaces what is between its two marks.

    Raises:
        ValueError: the page lacks the marks.
    """
    first, last = f"<!-- table {name}: python -m benchmarks.paper write -->\n", f"<!-- end of table {name} -->\n"
    if first not in page or last not in page:
        raise ValueError(f"the page lacks the marks of table {name}")
    before, _, rest = page.partition(first)
    return f"{before}{first}{table}\n{last}{rest.partition(last)[2]}"
