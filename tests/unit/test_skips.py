"""The last line of tools/test.sh: how many tests were skipped, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import summary

ROOT = Path(__file__).parents[2]
TESTS = """
import os, pytest

def test_runs(): pass

@pytest.mark.skipif(os.environ.get("RANKS") != "2", reason="needs two ranks")
def test_on_two_ranks(): pass

@pytest.mark.skip(reason="no cluster: slurmd is missing")
def test_on_a_cluster(): pass

@pytest.fixture
def gpu(): pytest.skip("needs a GPU")

def test_on_a_gpu(gpu): pass
def test_on_a_gpu_again(gpu): pass
"""


def test_no_skips_are_reported_as_such() -> None:
    assert summary([]) == summary([("a", None), ("b", None)]) == "0 tests skipped"


@pytest.mark.slow
def test_tests_that_ran_in_one_of_the_runs_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text('import pytest\npytest.importorskip("not_there_at_all")\n')
    outcomes = tmp_path / "outcomes"
    for ranks, options in (("1", []), ("2", ["-n", "1"])):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTEST_PLUGINS": "tests.skips",
            "HVD_BATCHGROW_TEST_OUTCOMES": str(outcomes),
            "RANKS": ranks,
        }
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."]
        done = subprocess.run(words, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    words = [sys.executable, "-m", "tests.skips", str(outcomes)]
    line = subprocess.run(words, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert line == (
        "4 tests skipped: 2 × needs a GPU; 1 × could not import 'not_there_at_all': "
        "No module named 'not_there_at_all'; 1 × no cluster: slurmd is missing\n"
    )
