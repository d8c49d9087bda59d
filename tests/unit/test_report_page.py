"""A report in headless Chromium: its charts, its script, its colors, and hostile files."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="needs selenium: pip install selenium")

from hvd_batchgrow.reports.build import build_document
from hvd_batchgrow.reports.document import Document, FigureRow
from hvd_batchgrow.reports.write import write_html
from tests.browser import Browser, browser, is_drawn  # noqa: F401
from tests.reported_runs import STORED, copied
from tests.unit.test_report_hostile import HOSTILE, poison

pytestmark = pytest.mark.slow

CHART = "figure.chart .plot svg"


def opened(browser: Browser, document: Document, path: Path) -> int:  # noqa: F811
    """Open a report; return the number of charts that it should have."""
    write_html(document, path)
    browser.open(path)
    return sum(len(row.figures) for row in document.blocks(FigureRow))


def test_every_chart_is_drawn_and_no_script_fails(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    num_charts = opened(browser, build_document([STORED], margin=20.0), tmp_path / "report.html")
    charts = browser.wait_for_charts(CHART, at_least=num_charts)
    assert len(charts) == num_charts > 10
    assert all(map(is_drawn, charts))
    browser.wait(lambda: browser.driver.execute_script("return document.documentElement.dataset.ready"), "script")
    assert browser.errors() == []
    for name, is_dark, is_paper in (("light", False, False), ("dark", True, False), ("print", True, True)):
        browser.emulate(dark=is_dark, paper=is_paper)
        color = browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (color == "rgb(255, 255, 255)") == (name != "dark")
        assert len(browser.find(CHART)) == num_charts
        browser.screenshot(f"report-{name}")
    browser.emulate()


DRAG = """
const plot = document.querySelector('figure[data-name=batch] .plot'), box = plot.getBoundingClientRect();
const send = (type, share) => plot.dispatchEvent(new PointerEvent(type, {
    clientX: box.left + share * box.width, clientY: box.top + 9, pointerId: 1, pointerType: 'mouse', button: 0 }));
plot.setPointerCapture = () => {};
const state = () => [plot.querySelector('.line').getAttribute('d'), plot.querySelector('.ticks').textContent.trim()];
const before = state();
send('pointermove', 0.5);
const hover = plot.querySelector('.hover').innerText;
send('pointerdown', 0.1); send('pointermove', 0.4); send('pointerup', 0.4);
const zoomed = state();
document.querySelector('figure[data-name=batch] .reset').click();
return [hover, before, zoomed, state()];
"""


def test_hover_shows_the_values_and_a_drag_zooms(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    document = build_document([STORED / "small-seed7", STORED / "small-seed7-twin"])
    browser.wait_for_charts(CHART, at_least=opened(browser, document, tmp_path / "report.html"))
    hover, before, zoomed, after = browser.driver.execute_script(DRAG)
    # Half of the axis is epoch 1.15, after two growths by 3 from 16, limited to 96; the twin keeps its batch.
    assert hover.split() == ["epochs", "1.1467", "small-seed7", "96", "small-seed7-twin", "16"]
    assert zoomed[0] != before[0]
    assert zoomed[1] != before[1]
    assert after[1] == before[1]
    assert browser.errors() == []


TICKS = """
const texts = () =>
  [...document.querySelectorAll('.ticks')].map(one => [...one.children].map(tick => tick.textContent));
const before = texts();
window.dispatchEvent(new Event('beforeprint'));  // redraws every chart
return [before, texts()];
"""


def test_the_script_draws_the_same_axes_as_the_page_had(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    num_charts = opened(browser, build_document([STORED]), tmp_path / "report.html")
    browser.wait_for_charts(CHART, at_least=num_charts)
    before, after = browser.driver.execute_script(TICKS)
    assert len(before) == num_charts
    assert all(before)
    assert after == before


@pytest.mark.parametrize("text", HOSTILE[:6])
def test_hostile_files_execute_nothing(text: str, browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    runs = copied(tmp_path, "small-seed7", "measured")
    for run in runs:
        poison(run, text.replace("alert(1)", "window.hacked=1"))
    num_charts = opened(browser, build_document(runs), tmp_path / "report.html")
    assert len(browser.wait_for_charts(CHART, at_least=num_charts)) == num_charts
    assert browser.driver.execute_script("return window.hacked") is None
    assert browser.errors() == []
