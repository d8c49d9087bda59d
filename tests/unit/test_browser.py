"""The browser helper reports charts that are not drawn, and errors of scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.browser import Browser, browser, has_color, is_drawn  # noqa: F401  # a fixture

pytestmark = pytest.mark.slow

LINE = '<path d="M0 0L50 50" stroke="red"/>'


def page(folder: Path, text: str) -> Path:
    path = folder / "page.html"
    path.write_text(f"<!doctype html><body>{text}", encoding="utf-8")
    return path


def test_only_drawn_charts_count_also_those_that_come_later(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    late = f"setTimeout(() => document.body.insertAdjacentHTML('beforeend', `<svg>{LINE}</svg>`), 300)"
    shadow = f"document.querySelector('div').attachShadow({{mode: 'open'}}).innerHTML = `<svg>{LINE}</svg>`"
    empty = '<svg></svg> <svg style="display: none"><circle r="5"/></svg>'
    text = f"<svg>{LINE}</svg> {empty} <div></div> <script>{shadow}; {late}</script>"
    browser.open(page(tmp_path, text))
    charts = browser.wait_for_charts("svg", at_least=3)
    assert len(charts) == 3
    assert all(map(is_drawn, charts))
    assert browser.errors() == []
    with pytest.raises(AssertionError, match=r"no 4 × svg in 0\.5 s"):
        browser.wait_for_charts("svg", at_least=4, deadline_s=0.5)


def test_a_gray_chart_has_no_curve(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    gray = LINE.replace("red", "#777")
    browser.open(page(tmp_path, f"<svg>{gray}</svg> <svg>{gray}{LINE}</svg>"))
    assert [has_color(chart) for chart in browser.find("svg")] == [False, True]


def test_a_shape_without_color_is_not_drawn(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    browser.open(page(tmp_path, '<svg><path d="M0 0L50 50"/></svg>'))
    assert [is_drawn(chart) for chart in browser.find("svg")] == [False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<script>throw new Error('one')</script>", "one"),
        ("<script>setTimeout(() => Promise.reject(new Error('two')))</script>", "two"),
        ("<script>console.error('three')</script>", "three"),
        ('<img src="https://example.com/four.png">', "four.png"),
        ('<img src="missing.png">', "missing.png"),
    ],
)
def test_errors_are_collected(browser: Browser, tmp_path: Path, text: str, expected: str) -> None:  # noqa: F811
    browser.open(page(tmp_path, text))
    browser.wait(lambda: [error for error in browser.errors() if expected in error], f"error with {expected}", 10)
    browser.open(page(tmp_path, "nothing is wrong here"))
    assert browser.errors() == []


def test_a_screenshot_shows_the_whole_page_as_it_is_emulated(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    dark = "@media (prefers-color-scheme: dark) { body { background: rgb(0, 0, 9) } }"
    paper = "@media print { body { background: rgb(9, 9, 0) } }"
    height = '<div style="height: 2000px"></div>'
    browser.open(page(tmp_path, f"<style>body {{ margin: 0; background: #fff }} {dark} {paper}</style>{height}"))
    colors = []
    for name, media in (("light", {}), ("dark", {"dark": True}), ("paper", {"paper": True})):
        browser.emulate(**media)
        path = browser.screenshot(f"helper-{name}")
        with Image.open(path) as picture:
            assert picture.size == (1280, 2000)
            colors.append(picture.convert("RGB").getpixel((640, 1990)))
    browser.emulate()
    assert colors == [(255, 255, 255), (0, 0, 9), (9, 9, 0)]
