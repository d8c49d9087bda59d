"""Every example: the commands of its README, equal weights on one rank and two and after a stop, its predictions.

An example is a folder of examples/ with a `job.toml`. Its `expected.toml` says what is expected of it.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.verification.digest import Weights, compare_weights, final_weights
from tests.launch.test_forms import captured, for_any_machine, run

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/job.toml"))


EXACT_IN_CI = ("fine_tuning", "language_model", "table")
"""Examples whose exact runs CI repeats: pictures with a frozen, pretrained network; text with the user's own network; a
table whose trigger decides when the batch grows. `make test-long` repeats those of the others."""


@dataclass(frozen=True)
class Example:
    """A copy of an example, whose README's commands have been run: the data and the run `runs/NAME` are there."""

    name: str
    folder: Path

    @property
    def expected(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "expected.toml").read_text())

    def run(self, form: str, *words: str, code: int = 0) -> None:
        done = run(self.folder, form, *words)
        assert done.returncode == code, done.stdout + done.stderr


def commands(readme: str) -> str:
    """Return the commands of a README as one script, for a machine with any number of cores."""
    blocks: list[str] = re.findall(r"^```sh\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    return for_any_machine("".join(blocks))


@pytest.fixture(scope="module", params=NAMES)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    """Copy an example to an empty folder and run the commands of its README there."""
    folder = tmp_path_factory.mktemp("examples") / request.param
    made = shutil.ignore_patterns("data", "runs", "__pycache__")
    shutil.copytree(EXAMPLES / request.param, folder, ignore=made)
    done = captured(["bash", "-euo", "pipefail", "-c", commands((folder / "README.md").read_text())], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return Example(request.param, folder)


def test_it_learns(example: Example) -> None:
    """The last evaluation of the README's run, which is that of the test set."""
    lines = (example.folder / "runs" / example.name / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if line["kind"] == "eval"][-1]
    assert last["dataset"] == "test"
    limits = [(name, value, 1) for name, value in example.expected.get("at_least", {}).items()]
    limits += [(name, value, -1) for name, value in example.expected.get("at_most", {}).items()]
    assert limits
    for name, limit, sign in limits:
        assert sign * last[name] >= sign * limit, f"{name} is {last[name]}"


@pytest.mark.parametrize(
    "example",
    [name if name in EXACT_IN_CI else pytest.param(name, marks=pytest.mark.long) for name in NAMES],
    indirect=True,
    scope="module",
)
def test_ranks_and_a_stop_change_no_bit_in_exact_mode(example: Example) -> None:
    def train(form: str, name: str, *words: str, code: int = 0) -> Weights:
        shorter = example.expected.get("exact_words", [])
        example.run(form, "train", "job.toml", "--name", name, "--layout.exact", "true", *shorter, *words, code=code)
        return final_weights(example.folder / "runs" / name)

    one = train("one", "one")
    assert one.is_final
    # The other run trains a part on two ranks and the rest on one.
    stopped = train("mpirun", "resumed", "--max-updates", str(example.expected["stop_after_updates"]), code=75)
    assert 0 < stopped.samples < one.samples
    assert compare_weights(one, train("one", "resumed", "--resume", "auto")) == "bit-identical"


def assert_answers(rows: list[dict[str, str]], expected: list[Any]) -> None:
    """Compare what `predict` printed: classes, labels of at least 1/2 in any order, or numbers within ranges."""
    if "class" in rows[0]:
        assert [row["class"] for row in rows] == expected
    elif "label" in rows[0]:
        assert sorted(row["label"] for row in rows if float(row["probability"]) >= 0.5) == expected
    else:
        assert len(rows) == len(expected)
        for row, ranges in zip(rows, expected, strict=True):
            assert all(low <= float(row[name]) <= high for name, (low, high) in ranges.items()), row


def test_the_run_folder_alone_predicts(example: Example, tmp_path: Path) -> None:
    """In another folder, with the run, what is to be predicted, and the modules that a network of the user needs."""
    shutil.copytree(example.folder / "runs" / example.name, tmp_path / "run")
    for path in example.folder.glob("*.py"):
        if path.name != "make_data.py":
            shutil.copy(path, tmp_path)
    for file, answers in example.expected.get("predicts", {}).items():
        shutil.copy(example.folder / file, tmp_path)
        done = run(tmp_path, "one", "predict", "run", file)
        assert done.returncode == 0, done.stderr
        assert_answers(list(csv.DictReader(io.StringIO(done.stdout))), answers)
