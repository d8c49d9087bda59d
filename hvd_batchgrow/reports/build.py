"""Make the document of a report from run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.reports import figures, text
from hvd_batchgrow.reports.document import Block, Column, Document, Paragraph, Section, Style, Table
from hvd_batchgrow.reports.order_record import read_order
from hvd_batchgrow.reports.overview import (
    compared,
    difference_section,
    fault_section,
    runs_section,
    verdict_section,
)
from hvd_batchgrow.reports.phases import phase_table, plan_notes
from hvd_batchgrow.reports.provenance import commands_section, environment_section, files_section, order_section
from hvd_batchgrow.reports.runs import NUM_COLORS, NUM_DASHES, Clock, ReportedRun, reported_runs
from hvd_batchgrow.reports.timeline import event_table
from hvd_batchgrow.results.comparison import Comparison
from hvd_batchgrow.results.records import number as finite


def build_document(
    paths: Sequence[Path],
    *,
    margin: float | None = None,
    price: float | None = None,
    command: Sequence[str] = (),
    made: str = "",
) -> Document:
    """Return the report of runs.

    Args:
        paths: run folders, and folders of run folders.
        margin: the largest difference that does not matter, for the verdict; None: not stated.
        price: of a rank-hour; None: no costs.
        command: the command line that makes the report, printed in it.
        made: when and by what the report is made, for the line below the title.

    Raises:
        RunError: a path contains no run, or no run can be read.
    """
    runs, faults = reported_runs(paths)
    orders = [read_order(run.folder / "consumed.jsonl") for run in runs]
    comparisons, reason = compared(runs, margin)
    sections = [
        verdict_section(comparisons, reason, faults),
        *fault_section(faults),
        runs_section(runs, price),
        *difference_section(runs),
        *_figure_sections(runs, comparisons),
        Section(
            "Plan against actual",
            (phase_table(runs), Paragraph(_PHASES), *plan_notes(runs), *figures.speed_figures(runs, Clock(runs))),
        ),
        Section("Time line", (event_table(runs, orders),)),
        order_section(runs, orders),
        environment_section(runs),
        *files_section(runs),
        commands_section(runs, command),
    ]
    more = f" and {counted(len(runs) - 1, 'more run')}" if len(runs) > 1 else ""
    return Document(f"{runs[0].label}{more}", text.clean(made), tuple(sections))


def _figure_sections(runs: Sequence[ReportedRun], comparisons: Sequence[Comparison]) -> list[Section]:
    """Return the sections that have figures."""
    clock = Clock(runs)
    found: list[tuple[str, str, Sequence[Block]]] = [
        ("Schedule", "Figure 1 of Smith et al. 2018: learning rate and batch.", figures.schedule_figures(runs, clock)),
        ("Curves", _CURVES, figures.curve_figures(runs, clock)),
        ("Difference of pairs", _PAIRS, figures.pair_figures(_pairs(runs, comparisons), clock)),
        ("Raised learning rate and momentum", _RAISED, _raised_blocks(runs, clock)),
        ("Noise scale", _NOISE, figures.noise_figures(runs, clock)),
    ]
    unit = "" if clock.label == "epochs" else " The training sets differ in size, so the x axis has samples."
    return [Section(title, (Paragraph(said + unit), *blocks)) for title, said, blocks in found if blocks]


_CURVES = (
    "Figures 2 to 4 of Smith et al. 2018: training and evaluation, by epochs and by updates. By epochs, runs that grow "
    "the batch and runs that decay the learning rate should lie on each other; by updates, the former end earlier. "
    "A curve of more than 500 records shows means over equal numbers of records, weighted by samples, in a band from "
    "their smallest to their largest value."
)
_PAIRS = (
    "The result of the first run of each pair minus that of the second, at the same number of samples. Where only one "
    "of them was evaluated, the other is interpolated."
)
_RAISED = (
    "Figures 5 to 7 of Smith et al. 2018: runs that start at a higher learning rate or momentum, beside those "
    "that do not. In the paper, they have a larger batch."
)
_PHASES = (
    "Layout: ranks × accumulation × micro-batch. Time is that of the updates. A phase that is not done has the time "
    "that it needs at its own speed so far."
)
_NOISE = (
    "The noise scale g of the schedule, as its plan has it: ε N / (B (1 − m)); with exact_noise, ε (N/B − 1) / "
    "(1 − m). For Adam it has no factor 1 / (1 − m); with the policy seesaw, and with a rule that multiplies ε by √κ, "
    "it is ε N / √(B B₀). A larger B and a smaller ε lower it."
)


def _pairs(
    runs: Sequence[ReportedRun], comparisons: Sequence[Comparison]
) -> list[tuple[ReportedRun, ReportedRun, Style]]:
    """Return the runs of each pair; those of a comparison share a color and differ in their dashes."""
    by_folder = {run.folder: run for run in runs}
    pairs = []
    for index, found in enumerate(comparisons):
        of_first, of_second = (arm.by_seed(found.metric, found.dataset) for arm in (found.first, found.second))
        for k, seed in enumerate(seed for seed in of_first if seed in of_second):
            folders = (runs_of[seed].folder for runs_of in (of_first, of_second))
            first, second = (by_folder[folder] for folder in folders)
            pairs.append((first, second, Style(index % NUM_COLORS, k % NUM_DASHES)))
    return pairs


def _raised_blocks(runs: Sequence[ReportedRun], clock: Clock) -> list[Block]:
    """Return a table and figures of the runs with the optimizer and data of runs that start at a raised value.

    A fork does not start at the values of its plan, so it has no place there.
    """
    groups: dict[tuple[str, str], list[ReportedRun]] = {}
    for run in (run for run in runs if run.files.forked_from is None):
        groups.setdefault((_name(run, "optim", "name"), _name(run, "data", "source")), []).append(run)
    blocks: list[Block] = []
    for group in groups.values():
        raised = [_raised(run, group) for run in group]
        if any(raised) and not all(raised):
            blocks.append(_raised_table(group, raised))
            for dataset in ("validation", "test"):
                metric = group[0].summary.metric
                shown = figures.evaluation_figures(group, metric, dataset, clock, prefix=f"raised-{len(blocks)}-")
                blocks += figures.row(shown)
    return blocks


def _name(run: ReportedRun, section: str, key: str) -> str:
    values = run.files.job.get(section)
    return str(values.get(key)) if isinstance(values, dict) else ""


def _raised(run: ReportedRun, group: Sequence[ReportedRun]) -> str:
    """Return which of the first learning rate and momentum is above the smallest of a group of runs."""
    found = []
    for key, name in (("lr", "ε"), ("momentum", "m")):
        smallest = min((value for other in group if (value := _first(other, key)) is not None), default=np.inf)
        value = _first(run, key)
        if value is not None and value > smallest * (1 + 1e-9):
            found.append(f"{name} {text.number(smallest)} → {text.number(value)}")
    return ", ".join(found)


def _first(run: ReportedRun, key: str) -> float | None:
    return finite(run.phases[0].get(key))


def _raised_table(group: Sequence[ReportedRun], raised: Sequence[str]) -> Table:
    columns = (
        Column("run", "run"),
        Column("raised", "raised"),
        Column("lr", "first ε", text.number, is_number=True),
        Column("momentum", "first m", text.number, is_number=True),
        Column("global_batch", "first B", text.integer, is_number=True),
        Column("updates", "updates planned", text.integer, is_number=True),
    )
    rows = [
        {"run": run.label, "raised": change or "no", "updates": run.summary.num_updates}
        | {key: _first(run, key) for key in ("lr", "momentum", "global_batch")}
        for run, change in zip(group, raised, strict=True)
    ]
    return Table("raised", columns, rows)
