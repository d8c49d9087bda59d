"""Reports of long runs: small, and with the extremes of every curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.reports.build import build_document
from hvd_batchgrow.reports.document import FigureRow
from hvd_batchgrow.reports.html import html_text
from tests.reported_runs import change_json, change_lines, long_run


def test_a_long_run_has_a_small_report_that_keeps_its_extremes(tmp_path: Path) -> None:
    check_long_run(tmp_path, 3_000)


@pytest.mark.long
@pytest.mark.slow
def test_a_million_records_have_a_small_report(tmp_path: Path) -> None:
    check_long_run(tmp_path, 1_000_000)


def check_long_run(folder: Path, num_records: int) -> None:
    document = build_document([long_run(folder, num_records)])
    (loss,) = (
        figure.curves[0].points
        for row in document.blocks(FigureRow)
        for figure in row.figures
        if figure.name == "train-loss-by-updates"
    )
    assert len(loss.x) == 500
    assert loss.x[-1] == num_records
    assert loss.low is not None
    assert loss.high is not None
    assert (loss.low.min(), loss.high.max()) == (pytest.approx(1 + 1 / num_records), 9.0)
    size = num_records / 500  # of a bin; the mean over the last one of 1 + 1/k
    assert loss.y[-1] == pytest.approx(1 + 1 / (num_records - size / 2), rel=1e-4)
    assert len(html_text(document).encode()) < 300_000


@pytest.mark.slow
def test_six_runs_with_many_records_make_less_than_2_mb(tmp_path: Path) -> None:
    runs = []
    for k in range(6):
        run = long_run(tmp_path / str(k), 600)
        change_json(run / "plan.json", lambda plan: plan["job_file"].update(seed=9))
        change_lines(run / "metrics.jsonl", lambda lines: [x for line in lines for x in (line, _evaluation(line))])
        runs.append(run)
    document = build_document(runs)
    assert len(html_text(document).encode()) < 2_000_000
    counts = {len(curve.points.x) for row in document.blocks(FigureRow) for f in row.figures for curve in f.curves}
    assert max(counts) == 500


def _evaluation(line: dict[str, Any]) -> dict[str, Any]:
    keys = ("samples", "epoch", "updates", "loss", "top1")
    return {"kind": "eval", "dataset": "test", **{key: line[key] for key in keys}}
