"""Open pages in headless Chromium, check that charts are drawn, collect script errors, and take screenshots.

    from tests.browser import browser  # noqa: F401  # a fixture

    def test_a_page(browser: Browser) -> None:
        browser.open(path)
        charts = browser.wait_for_charts("figure svg", at_least=3)
        assert all(map(is_drawn, charts))
        assert browser.errors() == []
        browser.screenshot("page")

Screenshots are written to build/screenshots, or to the folder in HVD_BATCHGROW_SCREENSHOTS. The browser reaches only
this machine: a page that loads anything from elsewhere has an error.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

DEADLINE_S = 60.0
"""Longest wait for a page; a test that passes waits only until its condition holds."""

_CATCH_ERRORS = """{
window.caughtErrors = [];
const add = text => window.caughtErrors.push(text);
window.addEventListener('error', event => add(event.message || `cannot load ${event.target.src}`), true);
window.addEventListener('unhandledrejection', event => add(`unhandled: ${event.reason}`));
}"""

_FIND = """
const found = [];
const search = root => {
    found.push(...root.querySelectorAll(arguments[0]));
    for (const element of root.querySelectorAll('*')) if (element.shadowRoot) search(element.shadowRoot);
};
search(document);
const box = element => element.getBoundingClientRect();
const shapes = 'path, line, polyline, polygon, rect, circle';
const hasShape = svg => [...svg.querySelectorAll(shapes)].some(shape => box(shape).width + box(shape).height > 0);
return found.filter(one => one.checkVisibility() && box(one).width > 0 && box(one).height > 0)
    .filter(one => one.tagName.toLowerCase() !== 'svg' || hasShape(one));
"""


class Browser:
    """A window of Chromium.

    Args:
        driver: of the window; the caller closes it.
        folder: for the screenshots.
    """

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self.folder = driver, folder
        self._logged: list[str] = []
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _CATCH_ERRORS})

    def open(self, target: Path | str) -> None:
        """Open a file or a URL, and forget the errors of earlier pages."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self._logged.clear()
        self.driver.get(target.resolve().as_uri() if isinstance(target, Path) else target)

    def emulate(self, *, dark: bool = False, paper: bool = False) -> None:
        """Emulate a dark or a light color scheme, on the screen or in print, for this and later pages."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        media = {"media": "print" if paper else "screen", "features": [scheme]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def find(self, selector: str) -> list[WebElement]:
        """Return the visible elements, also those in shadow roots; an SVG must contain a shape with an extent."""
        found: list[WebElement] = self.driver.execute_script(_FIND, selector)
        return found

    def wait(self, condition: Callable[[], Any], waited_for: str, deadline_s: float = DEADLINE_S) -> Any:
        """Return the condition's value as soon as it is true.

        Raises:
            AssertionError: the deadline has passed; the message has the errors of the page's scripts, and a screenshot
                shows the page.
        """
        try:
            return WebDriverWait(self.driver, deadline_s, 0.2).until(lambda _: condition())
        except TimeoutException as error:
            picture = self.screenshot("timed-out")
            raise AssertionError(f"no {waited_for} in {deadline_s:g} s: {self.errors()}, see {picture}") from error

    def wait_for_charts(self, selector: str, at_least: int = 1, deadline_s: float = DEADLINE_S) -> list[WebElement]:
        """Return the elements of `find` once there are this many."""
        enough: list[WebElement] = self.wait(
            lambda: found if len(found := self.find(selector)) >= at_least else None,
            f"{at_least} × {selector}",
            deadline_s,
        )
        return enough

    def errors(self) -> list[str]:
        """Return the errors since `open`: script errors, rejected promises, and failed loads."""
        new = self.driver.get_log("browser")  # since the last call
        self._logged += [entry["message"] for entry in new if entry["level"] == "SEVERE"]
        caught: list[str] = self.driver.execute_script("return window.caughtErrors || []")
        return self._logged + caught

    def screenshot(self, name: str) -> Path:
        """Write NAME.png with the whole page, also the part below the window; return its path."""
        area = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        options = {"captureBeyondViewport": True, "clip": {**area, "scale": 1}}
        data = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        path = self.folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))
        return path


def is_drawn(element: WebElement) -> bool:
    """Return whether an element has more than one color on the screen; it is scrolled into view."""
    pixels = _pixels(element)
    return bool((pixels != pixels[0, 0]).any())


def has_color(element: WebElement) -> bool:
    """Return whether an element has a pixel that is not gray: a curve, where axes and labels are gray."""
    pixels = _pixels(element).astype(int)
    return bool((pixels.max(axis=-1) - pixels.min(axis=-1) > 30).any())


def _pixels(element: WebElement) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"))


_FLAGS = (
    "--headless=new",
    "--window-size=1280,900",
    "--hide-scrollbars",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is small in containers
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A window of 1280 × 900 pixels in a light desktop; the test is skipped if Chromium is not installed."""
    driver = _start()
    try:
        window = Browser(driver, screenshots())
        window.emulate()
        yield window
    finally:
        driver.quit()


def screenshots() -> Path:
    """Return the folder of the screenshots."""
    given = os.environ.get("HVD_BATCHGROW_SCREENSHOTS")
    return Path(given) if given else Path(__file__).parents[1] / "build" / "screenshots"


def _start() -> Any:
    names = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "chromium-driver": ("chromedriver",)}
    found = {package: next(filter(None, map(shutil.which, programs)), None) for package, programs in names.items()}
    if missing := [package for package, path in found.items() if path is None]:
        pytest.skip(f"needs Chromium: apt-get install {' '.join(missing)}")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in _FLAGS:
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(found["chromium-driver"])  # a path, or selenium would download a driver
    return webdriver.Chrome(options, service)
