"""Tables of the studies, from the records that are kept."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.paper.kept_files import ENDING, unpack
from benchmarks.paper.studies import Arm, Study
from hvd_batchgrow.results.comparison import final_result
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.statistics import PairedDifference, paired_difference

Runs = Mapping[tuple[str, int], RunFiles]
"""Runs by the name without the seed, such as `grow` or `grow-twin`, and the seed."""


def read_runs(study: Study, results: Path) -> Runs:
    """Return the runs of a study that are kept."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in study.arms:
            for seed in study.seeds:
                for ending in ("", "-twin"):
                    packed = results / study.name / f"{arm.name}-seed{seed}{ending}{ENDING}"
                    if packed.exists():
                        found[arm.name + ending, seed] = RunFiles.read(unpack(packed, Path(folder)))
    return found


def markdown(study: Study, runs: Runs) -> str:
    """Return a table with a row for each arm that has runs.

    Differences are in percentage points of test accuracy, between runs of the same seed, with a 95 % t interval.
    """
    reference = study.arms[0].name
    head = ["job", "n", "batch (first seed)", "updates", "test accuracy", f"minus `{reference}`"]
    if any(arm.has_twin for arm in study.arms):
        head += ["twin's updates", "twin's accuracy", "minus twin"]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---' * (len(head) - 1)}|"]
    for arm in study.arms:
        seeds = [seed for seed in study.seeds if (arm.name, seed) in runs]
        if seeds:
            lines.append(f"| {' | '.join(_row(arm, reference, seeds, runs, len(head)))} |")
    return "\n".join(lines)


def _row(arm: Arm, reference: str, seeds: Sequence[int], runs: Runs, columns: int) -> list[str]:
    twin = f"{arm.name}-twin"
    cells = [
        f"`{arm.name}`",
        str(len(seeds)),
        _batches(runs[arm.name, seeds[0]]),
        _mean(runs, arm.name, seeds, lambda run: run.updates, "{:,.0f}"),
        _mean(runs, arm.name, seeds, accuracy, "{:.2f} %"),
        "" if arm.name == reference else _difference(runs, arm.name, reference, seeds),
    ]
    if columns > len(cells) and arm.has_twin:
        cells += [
            _mean(runs, twin, seeds, lambda run: run.updates, "{:,.0f}"),
            _mean(runs, twin, seeds, accuracy, "{:.2f} %"),
            _difference(runs, arm.name, twin, seeds),
        ]
    return cells + [""] * (columns - len(cells))


def accuracy(run: RunFiles) -> float:
    """Return the test accuracy at the end of a run, in percent. Raises ValueError if it has not been measured."""
    found = final_result(run, "top1", "test")
    if found is None:
        raise ValueError(f"{run.name} has no test accuracy at its end")
    return 100 * found


def _batches(run: RunFiles) -> str:
    """Return the batches of a run: all if they are few, else the first, the last and how often the batch grew."""
    batches = [phase["global_batch"] for phase in run.plan["phases"]]
    grown = [b for b, before in zip(batches, [0, *batches], strict=False) if b != before]
    if len(grown) <= 4:
        return " → ".join(f"{batch:,}" for batch in grown)
    return f"{grown[0]:,} → {grown[-1]:,} in {len(grown) - 1} steps"


def _mean(runs: Runs, name: str, seeds: Sequence[int], value: Callable[[RunFiles], float], form: str) -> str:
    return form.format(statistics.fmean(value(runs[name, seed]) for seed in seeds))


def _difference(runs: Runs, name: str, other: str, seeds: Sequence[int]) -> str:
    both = [seed for seed in seeds if (other, seed) in runs]
    if not both:
        return ""
    return interval_text(paired_difference([accuracy(runs[name, s]) - accuracy(runs[other, s]) for s in both]))


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
