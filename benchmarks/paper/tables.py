"""Tables of the studies, from the records that are kept."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.paper.kept_files import ENDING, unpack
from benchmarks.paper.studies.study import Arm, Study, Table
from benchmarks.paper.training import ROOT
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.results.comparison import final_result
from hvd_batchgrow.results.confounds import changed_keys
from hvd_batchgrow.results.run_cost import RunCost
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.statistics import PairedDifference, equivalence, paired_difference
from hvd_batchgrow.storage.toml_file import read_value

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


def check_jobs(study: Study, runs: Runs) -> None:
    """Check that the runs were trained by the jobs that the study has now; twins are not checked.

    Raises:
        ValueError: the job of an arm, or its changes, are others.
    """
    for arm in study.arms:
        changes = {key: read_value(value) for key, value in {**study.changes, **arm.changes}.items()}
        job = load_job(ROOT / arm.job, changes).model_dump(mode="json")
        for (name, seed), run in runs.items():
            keys = changed_keys(run.job, job) if name == arm.name else []
            if keys:
                fault = f"{study.name}/{name}-seed{seed} was trained with another {', '.join(keys)}"
                raise ValueError(f"{fault}: remove its records, and train it again")


def runs_of(table: Table, name: str, runs: Runs) -> dict[int, RunFiles]:
    """Return the runs of a row by seed."""
    return {seed: runs[name, seed] for seed in table.study.seeds_of(table.rows[name]) if (name, seed) in runs}


def markdown(table: Table, runs: Runs) -> str:
    """Return the table, with a row for each arm that has runs.

    Differences of accuracy are in percentage points. They are between runs of the same seed, with a 95 % t interval.
    With a margin, the table says where two one-sided t tests at 5 % find that the difference is within it.
    """
    reference = next(iter(table.rows))
    result = f"{table.dataset} {table.result}"
    head = ["job", "n", "batch (first seed)", "updates", result, f"minus `{reference}`"]
    if table.with_seconds:
        head.append("seconds of training")
    if table.with_twins:
        head += ["twin's updates", f"twin's {table.result}", "minus twin"]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---' * (len(head) - 1)}|"]
    for name, arm in table.rows.items():
        if found := runs_of(table, name, runs):
            cells = [
                f"`{name}`",
                str(len(found)),
                _batches(next(iter(found.values()))),
                _updates(table, found, runs_of(table, reference, runs)),
                _mean(table, found),
                "" if name == reference else _difference(table, name, reference, runs),
            ]
            if table.with_seconds:
                cells.append(f"{statistics.median(RunCost.of(run).seconds for run in found.values()):.0f}")
            if table.with_twins:
                cells += _twin_cells(table, arm, runs) if arm.has_twin and name == arm.name else [""] * 3
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _twin_cells(table: Table, arm: Arm, runs: Runs) -> list[str]:
    twin = f"{arm.name}-twin"
    found = {seed: runs[twin, seed] for seed in runs_of(table, arm.name, runs) if (twin, seed) in runs}
    if not found:
        return [""] * 3
    return [f"{_mean_updates(found):,.0f}", _mean(table, found), _difference(table, arm.name, twin, runs)]


def _updates(table: Table, found: Mapping[int, RunFiles], reference: Mapping[int, RunFiles]) -> str:
    """Return the mean updates, with a margin also how many times fewer than those of the reference."""
    updates = _mean_updates(found)
    fewer = _mean_updates(reference) / updates if reference else 1.0
    return f"{updates:,.0f}" + (f" ({fewer:.2f}× fewer)" if table.margin is not None and fewer > 1 else "")


def _mean_updates(found: Mapping[int, RunFiles]) -> float:
    """Return the mean updates of runs, with those of the branches that a trigger has trained."""
    return RunCost.mean(list(found.values())).updates


def _mean(table: Table, found: Mapping[int, RunFiles]) -> str:
    """Return the mean result of runs."""
    mean = statistics.fmean(result_of(table, run) for run in found.values())
    return f"{mean:.2f} %" if table.result == "accuracy" else f"{mean:.4f}"


def _difference(table: Table, name: str, other: str, runs: Runs) -> str:
    """Return the difference of two rows over the seeds that both have."""
    pairs = [(run, runs[other, seed]) for seed, run in runs_of(table, name, runs).items() if (other, seed) in runs]
    if not pairs:
        return ""
    found = [result_of(table, first) - result_of(table, second) for first, second in pairs]
    text = interval_text(paired_difference(found), digits=2 if table.result == "accuracy" else 4)
    if table.margin is not None and equivalence(found, table.margin).is_equivalent:
        text += f", within ±{table.margin:g}"
    return text


def result_of(table: Table, run: RunFiles) -> float:
    """Return the result at the end of a run: accuracy in percent, or the loss.

    Raises:
        ValueError: it has not been measured.
    """
    found = final_result(run, "top1" if table.result == "accuracy" else "loss", table.dataset)
    if found is None:
        raise ValueError(f"{run.name} has no {table.result} on the {table.dataset} set at its end")
    return 100 * found if table.result == "accuracy" else found


def _batches(run: RunFiles) -> str:
    """Return the batches of a run: all if they are few, else the first, the last and how often the batch grew."""
    batches = [phase["global_batch"] for phase in run.plan["phases"]]
    grown = [b for b, before in zip(batches, [0, *batches], strict=False) if b != before]
    if len(grown) <= 4:
        return " → ".join(f"{batch:,}" for batch in grown)
    return f"{grown[0]:,} → {grown[-1]:,} in {len(grown) - 1} steps"


def interval_text(difference: PairedDifference, digits: int = 2) -> str:
    """Return the mean of differences with its interval, if there is one."""
    text = f"{difference.mean:+.{digits}f}"
    if difference.low is not None and difference.high is not None:
        text += f" ({difference.low:+.{digits}f} to {difference.high:+.{digits}f})"
    return text.replace("-", "−")
