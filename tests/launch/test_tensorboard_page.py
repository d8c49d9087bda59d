"""TensorBoard in a browser, on a run that was stopped and resumed, and on its twin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import tomli_w

from tests.browser import Browser, browser, has_color  # noqa: F401  # a fixture
from tests.helpers import job_tree, small_source, write_idx_folder

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its first checkpoint, and resumed; and its twin."""
    folder = tmp_path_factory.mktemp("runs")
    write_idx_folder(folder / "data", small_source())
    noise = {"measure": True, "ema_epochs": 10.0}
    tree = job_tree("data", logging={"tensorboard": True}, gradient_noise=noise, layout={"max_micro_batch": 8})
    (folder / "small.toml").write_text(tomli_w.dumps(tree))
    for command in (["train", "--max-updates", "12"], ["twin", "--resume", "auto"]):
        words = [sys.executable, "-m", "hvd_batchgrow.cli", command[0], "small.toml", *command[1:]]
        done = subprocess.run(words, check=False, cwd=folder, env=ENV, capture_output=True, text=True, timeout=300)
        assert done.returncode in {0, 75}, done.stderr
    return folder / "runs"


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read both runs."""
    log = runs.parent / "tensorboard.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "localhost", "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=ENV)
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        process.wait(30)


def fetch(address: str) -> Any:
    with urlopen(address, timeout=60) as answer:  # noqa: S310  # this machine's
        return json.load(answer)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = [word for word in log.read_text().split() if word.startswith("http://localhost:")]
        try:
            if found and len(fetch(f"{found[0]}data/runs")) == 2:
                return found[0]
        except URLError:
            pass
        time.sleep(0.2)
    pytest.fail(f"TensorBoard does not answer: {log.read_text()}")


def points(server: str, run: str, tag: str) -> list[int]:
    query = urlencode({"run": run, "tag": tag})
    return [step for _, step, _ in fetch(f"{server}data/plugin/scalars/scalars?{query}")]


def test_the_server_has_run_names_and_each_point_once(server: str, runs: Path) -> None:
    assert set(fetch(f"{server}data/runs")) == {"small", "small-twin"}
    lines = [json.loads(line) for line in (runs / "small" / "metrics.jsonl").read_text().splitlines()]
    assert points(server, "small", "train/loss") == [line["samples"] for line in lines if line["kind"] == "train"]
    assert points(server, "small", "val/top1") == [line["samples"] for line in lines if line["kind"] == "eval"]


def test_every_curve_is_drawn(browser: Browser, server: str) -> None:  # noqa: F811
    tags = {tag for tags in fetch(f"{server}data/plugin/scalars/tags").values() for tag in tags}
    assert {"train/loss", "val/top1", "progress/updates", "progress/hours", "noise/scale", "batch/global"} < tags
    browser.driver.set_window_size(1280, 300 * len(tags))  # a card is drawn once it is in the window
    browser.open(f"{server}#timeseries")
    browser.wait_for_charts("scalar-card line-chart")
    for group in browser.find("metrics-card-group-toolbar button"):
        if group.find_elements("css selector", "[svgicon=expand_more_24px]"):
            group.click()
    charts = browser.wait_for_charts("scalar-card line-chart", at_least=len(tags))
    shown = {title.get_attribute("title") for title in browser.find("scalar-card .tag")}
    browser.wait(lambda: all(map(has_color, charts)), "curve in every chart")
    browser.screenshot("tensorboard-time-series")
    assert shown == tags
    assert {"small", "small-twin"} <= set(browser.find("runs-data-table")[0].text.splitlines())
    assert browser.errors() == []


def test_the_layout_has_a_curve_in_every_chart(browser: Browser, server: str) -> None:  # noqa: F811
    browser.driver.set_window_size(1280, 2800)
    browser.open(f"{server}#custom_scalars")
    charts = browser.wait_for_charts("vz-line-chart2", at_least=10)
    curves = "return arguments[0].map(chart => chart.shadowRoot.querySelectorAll('path').length)"
    browser.wait(lambda: all(browser.driver.execute_script(curves, charts)), "curve in every chart")
    browser.screenshot("tensorboard-custom-scalars")
    assert len(charts) == 10
    assert browser.errors() == []


@pytest.mark.parametrize(("tab", "expected"), [("text", "global_batch = 16"), ("hparams", "schedule.policy")])
def test_a_tab_has_its_content(browser: Browser, server: str, tab: str, expected: str) -> None:  # noqa: F811
    browser.driver.set_window_size(1280, 1200)
    browser.open(f"{server}#{tab}")
    selector = {"text": "tf-text-loader", "hparams": "tf-hparams-table-view"}[tab]
    browser.wait(lambda: expected in "".join(one.text for one in browser.find(selector)), expected)
    browser.screenshot(f"tensorboard-{tab}")
    assert browser.errors() == []
