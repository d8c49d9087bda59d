"""The live view as lines of text: a pure function of the view, the width and the time.

Text has the terminal's default color. The other two, magenta and red, are readable on dark and on light backgrounds.
No information is in the color alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from hvd_batchgrow.messages.wording import metric_name, metric_value, time_text
from hvd_batchgrow.observers.console import BAR, Span
from hvd_batchgrow.results.live_state import LiveView
from hvd_batchgrow.results.record_lines import EvaluationLine, NoiseBand, TrainLine

_LABEL = 11
"""Columns of a label."""
_GAP = 2
"""Columns between two fields."""
_COLUMNS = {120: 3, 64: 2, 0: 1}
"""Number of fields in a line, by the smallest width."""
_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*#"
_MOST_TREND = 60
_ORDER = {
    3: ("loss", "metric", "samples/s", "evaluated", "best", "updates", "data wait", "all-reduce", "B_simple"),
    2: ("loss", "metric", "evaluated", "best", "samples/s", "updates", "data wait", "all-reduce", "B_simple"),
    1: ("loss", "metric", "evaluated", "best", "updates", "samples/s", "data wait", "all-reduce", "B_simple"),
}

Field = tuple[str, str, Sequence[float]]
"""Label, value, and the values of a trend."""


def live_lines(view: LiveView, width: int, now_s: float, *, ascii_only: bool = False) -> list[list[Span]]:
    """Return the lines of the live view, none of them wider than `width`.

    Args:
        view: the state of the run.
        width: columns of the terminal, at least 1.
        now_s: seconds on the clock of `LiveView.record_at_s`.
        ascii_only: use only ASCII characters for trends and bars.
    """
    num = next(columns for least, columns in _COLUMNS.items() if width >= least)
    fields = _fields(view)
    lines = [
        _heading(view, width, "-" if ascii_only else "─"),
        *_phase_lines(view, one_line=num > 1),
        *_rows([fields[name] for name in _ORDER[num] if name in fields], num, width, ascii_only=ascii_only),
        *_bars(view, width, now_s, ascii_only=ascii_only),
        *_footer(view, now_s),
    ]
    return [_fit(line, width) for line in lines]


def _fit(spans: Sequence[Span], width: int) -> list[Span]:
    """Cut a line at a width, and mark the cut with an ellipsis."""
    if sum(cell_len(text) for text, _ in spans) <= width:
        return [*spans]
    fitted, free = [], width - 1
    for text, style in spans:
        part = text if cell_len(text) <= free else set_cell_size(text, free)
        fitted.append((part, style))
        free -= cell_len(part)
    return [*fitted, ("…", "")]


def _heading(view: LiveView, width: int, rule: str) -> list[Span]:
    epochs = f"epoch {view.epoch:.2f} of {view.plan.end_samples / view.plan.num_samples:.2f}"
    free = width - 8 - cell_len(view.plan.name) - cell_len(epochs)
    if free < 1:
        return [(f"{view.plan.name}: {epochs}", "bold")]
    return [
        (f"{rule * 2} ", ""),
        (view.plan.name, "bold"),
        (f" {rule * free} ", ""),
        (epochs, "bold"),
        (f" {rule * 2}", ""),
    ]


def _phase_lines(view: LiveView, *, one_line: bool) -> list[list[Span]]:
    """Return the number of the phase, its learning rate and its batch, on one line or on three."""
    so_far = " so far" * view.plan.may_grow
    lr = "" if view.record is None else f"{view.record.lr:.4g}"
    phase, batch = f"{view.phase + 1} of {len(view.plan.phases)}{so_far}", _batch(view)
    if not one_line:
        return [[_label(name), (text, "bold")] for name, text in (("phase", phase), ("lr", lr), ("B", batch))]
    spans = [_label("phase"), (phase, "bold")]
    return [
        spans
        + [span for name, text in (("lr", lr), ("B", batch)) if text for span in ((f"  {name} ", ""), (text, "bold"))]
    ]


def _label(name: str) -> Span:
    return f"{set_cell_size(name, _LABEL - 1)} ", ""


def _fields(view: LiveView) -> dict[str, Field]:
    record, plan = view.record, view.plan
    metric = metric_name(plan.metric)
    shares = (math.nan, math.nan) if record is None else (record.data_wait_pct, record.allreduce_pct)
    last = metric_value(plan.metric, view.metrics[-1]) if view.metrics else ""
    return {
        "loss": ("loss", "" if record is None else f"{record.loss:.4f}", view.losses),
        **({"metric": (metric, last, view.metrics)} if plan.metric != "loss" else {}),
        "evaluated": ("evaluated", _result(view.last, plan.metric, with_set=True), ()),
        "best": ("best", _result(view.best, plan.metric), ()),
        "samples/s": ("samples/s", "" if record is None else f"{record.samples_per_s:,.0f}", ()),
        "updates": ("updates", f"{0 if record is None else record.updates:,} of {plan.num_updates:,}", ()),
        "data wait": ("data wait", _percent(shares[0]), ()),
        "all-reduce": ("all-reduce", _percent(shares[1]), ()),
        "B_simple": ("B_simple", _noise(record), ()),
    }


def _batch(view: LiveView) -> str:
    """Return B as a product; if the parts are unequal, the numbers without a product."""
    record = view.record
    if record is None:
        return f"{view.plan.phases[view.phase].global_batch:,}"
    micro_batch = view.plan.micro_batches[view.phase]
    ranks = f"{record.ranks:,} rank{'s' * (record.ranks != 1)}"
    passes = f"{record.accumulation:,} pass{'es' * (record.accumulation != 1)}"
    if record.ranks * record.accumulation * micro_batch == record.global_batch:
        return f"{record.global_batch:,} = {ranks} × {passes} × {micro_batch:,}"
    return f"{record.global_batch:,} on {ranks}, {passes} of ≤ {micro_batch:,}"


def _result(evaluation: EvaluationLine | None, metric: str, *, with_set: bool = False) -> str:
    if evaluation is None:
        return "not yet" if with_set else "none yet"
    value = evaluation.value(metric)
    text = "no finite value" if value is None else metric_value(metric, value)
    return f"{text} ({f'{evaluation.dataset}, ' * with_set}epoch {evaluation.epoch:.2f})"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1f} %"


def _noise(record: TrainLine | None) -> str:
    """Return the gradient noise scale with its 95 % confidence interval."""
    band = None if record is None else record.noise
    if band is None:
        return "not measured"
    known = "unresolved" if band.b_simple is None else f"{band.b_simple:,.0f}"
    layers = "" if band.factor is None else f" (norm layers × {band.factor:.2f})"
    return known + _interval(band) + layers


def _interval(band: NoiseBand) -> str:
    if band.low is None:
        return "" if band.b_simple is None else ", 95 % unknown"
    return f", 95 % {band.low:,.0f} to {band.high:,.0f}" if band.high is not None else f", 95 % ≥ {band.low:,.0f}"


def _rows(fields: Sequence[Field], num: int, width: int, *, ascii_only: bool) -> list[list[Span]]:
    """Arrange fields in lines of `num`."""
    cell = (width - _GAP * (num - 1)) // num
    rows = []
    for start in range(0, len(fields), num):
        row: list[Span] = []
        for field in fields[start : start + num]:
            spans = _fit(_cell(*field, cell, ascii_only=ascii_only), cell)
            used = sum(cell_len(text) for text, _ in spans)
            row += [*spans, (" " * (cell - used + _GAP), "")]
        rows.append(row[:-1])
    return rows


def _cell(label: str, value: str, trend: Sequence[float], width: int, *, ascii_only: bool) -> list[Span]:
    free = min(_MOST_TREND, width - _LABEL - cell_len(value) - 2)
    spans = [_label(label), (value, "bold")]
    if len(trend) > 1 and free >= 3:
        spans.append((f"  {sparkline(trend[-free:], _ASCII_LEVELS if ascii_only else _LEVELS)}", ""))
    return spans


def sparkline(values: Sequence[float], levels: str = _LEVELS) -> str:
    """Return one character per value, scaled from the smallest value to the largest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(levels) - 1
    return "".join(
        " " if not math.isfinite(value) else levels[round(top * (value - low) / span) if 0 < span < math.inf else 0]
        for value in values
    )


def _bars(view: LiveView, width: int, now_s: float, *, ascii_only: bool) -> list[list[Span]]:
    """Return the progress bars of the phase and of the run, with the time left."""
    passed_s = 0.0 if view.record_at_s is None else now_s - view.record_at_s
    seconds = (math.nan, math.nan) if view.to_go is None else (view.to_go.phase_s, view.to_go.run_s)
    shares = {"phase": view.phase_share, "run": view.run_share}
    texts = [
        f" {100 * share:5.1f} %" + ("" if math.isnan(left) else f"  {time_text(left - passed_s)} left")
        for share, left in zip(shares.values(), seconds, strict=True)
    ]
    longest = max(map(len, texts))
    free = max(0, width - _LABEL - longest)
    full, rest = "#." if ascii_only else "━╌"
    return [
        [
            _label(label),
            (full * int(share * free), BAR),
            (rest * (free - int(share * free)), ""),
            (text, "bold"),
        ]
        for (label, share), text in zip(shares.items(), texts, strict=True)
    ]


def _footer(view: LiveView, now_s: float) -> list[list[Span]]:
    """Return the last line: skipped updates first, then the age of the last record and the state of the run."""
    ago = [] if view.record_at_s is None else [f"last record {time_text(now_s - view.record_at_s)} ago"]
    skipped = 0 if view.record is None else view.record.skipped
    parts: list[Span] = [(f"{skipped:,} updates skipped", "bold red")] if skipped else []
    parts += [(text, "") for text in ago + ([view.state] if view.state else [])]
    return [[span for part in parts for span in ((", ", ""), part)][1:]] if parts else []
