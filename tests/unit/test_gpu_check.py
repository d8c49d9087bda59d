"""The GPU check without a GPU: skipped rows, missing packages, limits of time, and whole rows on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.rows import ROWS, TOTAL_S
from benchmarks.gpu.test_suite import outcome_of
from benchmarks.rows import packages
from benchmarks.rows.figures import Figure, Group, Outcome, compare
from benchmarks.rows.processes import run_limited
from benchmarks.rows.report import NOT_A_MEASUREMENT, WIDTH, heading, row_lines
from benchmarks.turns import take_turns

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
THIRD_PARTY = [name for name in packages.requirements() if not name.startswith("nvidia")]
HIDING = """
import importlib.machinery, os
find_spec = importlib.machinery.PathFinder.find_spec
def find(name, path=None, target=None):
    return None if name in os.environ["HIDDEN"].split(",") else find_spec(name, path, target)
importlib.machinery.PathFinder.find_spec = find
"""


def check(out: Path, *words: str, python: str = sys.executable, **environment: str) -> tuple[int, str, dict[str, Any]]:
    """Run the check; return its exit code, what it prints, and its file."""
    done = subprocess.run(
        [python, "-m", "benchmarks.gpu", "--out", str(out), *words],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    (file,) = out.glob("gpu-check-*.json") if done.returncode in (0, 1) else (None,)
    assert file is not None, done.stderr
    return done.returncode, done.stdout, json.loads(file.read_text())


def test_without_a_gpu_each_row_is_skipped_with_the_reason(tmp_path: Path) -> None:
    code, text, tree = check(tmp_path)
    assert code == 0
    assert list(tree["rows"]) == list(ROWS)
    for name, row in tree["rows"].items():
        assert row["skipped"].startswith(("torch ", "not installed: ")), row
        assert re.search(rf"^{name}: skipped: ", text, flags=re.MULTILINE)
    assert tree["machine"]["no_gpu"] in {row["skipped"] for row in tree["rows"].values()}
    assert f"0 ok, 0 failed, {len(ROWS)} skipped" in text
    assert re.fullmatch(r"gpu-check-\d{4}-\d\d-\d\d-\d{6}.json", next(tmp_path.glob("*.json")).name)


def test_a_python_without_packages_names_them_and_skips_what_needs_them(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare" / "bin" / "python")
    code, text, tree = check(tmp_path, "--device", "cpu", python=python, PYTHONPATH=str(ROOT))
    assert code == 0
    assert {row["skipped"].partition(":")[0] for row in tree["rows"].values()} == {"not installed"}
    (line,) = [line for line in text.splitlines() if "pip install" in line]
    for requirement in ("'pydantic>=2.7'", "'tyro>=0.9'", "'tomli-w>=1.0'", "'crc32c>=2.7'", "triton", "'pytest>=8.3'"):
        assert f" {requirement}" in line
    assert set(tree["missing"]) >= {"torch", "pydantic", "tyro", "tomli-w", "crc32c", "nvidia-dali", "triton", "pytest"}


def test_the_line_of_pip_keeps_torch_and_matches_cuda() -> None:
    names = ["pydantic", "nvidia-dali", "torchvision"]
    assert packages.pip_line(names, "2.14.1+cu130", "13.0") == (
        "python -m pip install 'pydantic>=2.7' nvidia-dali-cuda130==2.4.0 'torchvision>=0.20' torch==2.14.1"
    )
    assert " 'nvidia-dali-cuda120>=1.50' " in packages.pip_line(names, "2.6.0", "12.4")
    assert packages.pip_line(["triton"], None, None) == "python -m pip install triton"


def test_the_default_budgets_fit_the_total_and_the_page_has_them() -> None:
    assert sum(row.budget_s for row in ROWS.values()) <= TOTAL_S == 480
    page = (ROOT / "docs" / "performance.md").read_text().partition("## On a CPU")[0]
    found = re.findall(r"^\| `(\w+)` \| (\d+) s \|", page, flags=re.MULTILINE)
    assert [(name, float(budget)) for name, budget in found] == [(name, row.budget_s) for name, row in ROWS.items()]


TINY = [name for name in ROWS if name != "tests"]
"""tools/test.sh runs tests/gpu itself."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_row_works_on_a_cpu_with_only_the_packages_that_it_names(name: str, tmp_path: Path) -> None:
    if lacking := packages.missing(ROWS[name].needs):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    hidden = [packages.module_of(other) for other in THIRD_PARTY if other not in ROWS[name].needs]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = ("--device", "cpu", "--rows", name, "--budget-s", "120")
    code, text, tree = check(tmp_path, *words, PYTHONPATH=paths, HIDDEN=",".join(hidden))
    row = tree["rows"][name]
    assert (code, row["failed"], row["skipped"]) == (0, "", ""), row
    assert tree["note"].startswith("On a CPU, with tiny networks and sizes")
    assert tree["note"].partition(":")[0] in text.replace("\n    ", " ")
    for group in row["groups"]:
        for figure in group["figures"]:
            assert figure["summary"]["n"] == len(figure["values"]) == 3
            assert figure["summary"]["least"] > 0
    assert max(map(len, text.split(str(tmp_path))[0].splitlines())) <= WIDTH


def test_a_row_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'benchmarks.rows.child' in sys.orig_argv and 'optimizers' in sys.orig_argv:\n"
        "    raise SystemExit('it is broken')\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    code, _, tree = check(tmp_path, "--device", "cpu", "--rows", "optimizers", "wrn", PYTHONPATH=paths)
    assert code == 1
    assert tree["rows"]["optimizers"]["failed"].startswith(
        "its process has ended with code 1: SystemExit: it is broken ("
    )
    assert (tree["rows"]["wrn"]["failed"], tree["rows"]["wrn"]["skipped"]) == ("", "")


def test_a_row_that_takes_twice_its_budget_fails(tmp_path: Path) -> None:
    code, _, tree = check(tmp_path, "--device", "cpu", "--rows", "two_ranks", "--budget-s", "0.02")
    assert code == 1
    assert tree["rows"]["two_ranks"]["failed"].startswith("stopped after twice its budget of 0.02 s; its last output: ")


def test_a_process_at_its_limit_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = ["sh", "-c", f"sleep 300 & echo $! $$ > {pids}; echo working; sleep 300"]
    begin = time.monotonic()
    assert run_limited(command, tmp_path, os.environ, tmp_path / "log", 2.0, "row") is None
    assert 2.0 <= time.monotonic() - begin < 60
    assert (tmp_path / "log").read_text() == "working\n"
    for pid in pids.read_text().split():
        state = Path(f"/proc/{pid}/stat")
        deadline = time.monotonic() + 60
        while state.exists() and state.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_process_that_ends_in_time_returns_its_code(tmp_path: Path) -> None:
    assert run_limited(["sh", "-c", "exit 3"], tmp_path, os.environ, tmp_path / "log", 60.0, "row") == 3


def test_turns_end_when_time_is_over_but_not_before_the_third() -> None:
    def turns(is_over: Callable[[], bool]) -> int:
        return len(take_turns({"a": lambda: 1, "b": lambda: 1}, 9, is_over)["a"])

    answers = iter([False, True])
    assert [turns(lambda: False), turns(lambda: True), turns(lambda: next(answers))] == [9, 3, 4]


def test_ratios_are_those_of_the_same_turn() -> None:
    group = compare("t", "GB/s", {"a": [2.0, 4.0, 6.0], "b": [1.0, 4.0, 9.0]}, "a", scale=10.0)
    assert group.figures == [Figure("a", [20.0, 40.0, 60.0]), Figure("b", [10.0, 40.0, 90.0], [0.5, 1.0, 1.5])]


def test_an_outcome_survives_the_file() -> None:
    outcome = Outcome([compare("t", "s", {"a": [2.0, 4.0, 9.0], "b": [1.0, 4.0, 5.0]}, "a")], ["note"], "failed")
    tree = json.loads(json.dumps(outcome.to_json()))
    assert tree["groups"][0]["figures"][0]["summary"] == {"n": 3, "median": 4.0, "least": 2.0, "most": 9.0}
    assert Outcome.from_json(tree) == outcome


SKIPPED = '<testcase name="b"><skipped message="no GPU"/></testcase>'

WHOLE_FILE = (
    '<testcase classname="" name="tests.gpu.test_a"><skipped type="pytest.skip" message="collection skipped">'
    "('/a/test_a.py', 13, 'Skipped: no Triton')</skipped></testcase>"
)


@pytest.mark.parametrize(
    ("body", "code", "counts", "failed", "skipped"),
    [
        (f'<testcase classname="t" name="a"/>{SKIPPED}', 0, [1, 0, 1], "", ""),
        ('<testcase classname="t" name="a"><failure/></testcase><testcase name="b"/>', 1, [1, 1, 0], "t::a", ""),
        ('<testcase classname="t" name="a"><error/></testcase>', 1, [0, 1, 0], "t::a", ""),
        (SKIPPED, 0, [0, 0, 1], "", "no test ran: 1 skipped: no GPU"),
        (WHOLE_FILE, 5, [0, 0, 1], "", "no test ran: 1 skipped: no Triton"),
        ('<testcase name="a"/>', 2, [1, 0, 0], "pytest has ended with code 2", ""),
    ],
)  # fmt: skip
def test_tests_are_counted(body: str, code: int, counts: list[int], failed: str, skipped: str, tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    outcome = outcome_of(tmp_path / "report.xml", code)
    assert [figure.values for figure in outcome.groups[0].figures] == [[float(count)] for count in counts]
    assert (outcome.failed, outcome.skipped) == (failed, skipped)


def test_the_heading_describes_the_machine_in_80_columns() -> None:
    machine = {
        "gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_gib": 79.6, "driver": "570.86.15", "cuda": "13.0", "cudnn": 91300,
        "nccl": "2.29.7", "gpu_use": "0 %, 4 MiB", "torch": "2.14.1+cu130", "python": "3.12.3", "commit": "563d5fd",
        "versions": {"torchvision": "0.29.1", "triton": "3.9.0"}, "cores": 26, "load": [0.4, 0.2, 0.1],
    }  # fmt: skip
    text = heading(machine, is_tiny=False)
    assert max(map(len, text.splitlines())) <= WIDTH
    for part in ("H100 80GB HBM3, 79.6 GiB, driver 570.86.15, CUDA 13.0", "torch 2.14.1+cu130", "26 cores, load 0.4"):
        assert part in text.replace("\n    ", " ")
    assert NOT_A_MEASUREMENT not in text


def test_lines_have_at_most_80_columns() -> None:
    values = [1e-4, 123.4, 1234567.0]
    figures = [Figure("hvd_batchgrow, Triton + ReLU", values, [0.001, 1.0, 12.34]), Figure("copy", values)]
    outcome = Outcome([Group("a title " * 20, "samples/s", figures, "torch SGD, fused")], ["a note " * 20], "why " * 60)
    lines = list(row_lines("resnet50_dali", "what " * 30, outcome, 1234.5, 60.0))
    assert max(map(len, lines)) == WIDTH
