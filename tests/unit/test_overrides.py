"""Overrides of the job file on the command line: one reading for all commands, and one writing of what is printed."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.cli import main
from hvd_batchgrow.job_file import override_words, split_overrides
from hvd_batchgrow.storage.toml_file import read_value
from tests.helpers import job_tree, measured_tree

ARGUMENTS = {"dense": True, "widths": [4, 8], "scale": 0.5, "label": "a=b: 'c' 😀"}
SPELLINGS = {
    "TOML": """{dense = true, widths = [4, 8], scale = 0.5, label = "a=b: 'c' 😀"}""",
    "TOML, dotted": """{dense=true,"widths"=[4,8,],scale=5e-1,label="a=b: 'c' \\U0001F600"}""",
    "JSON": """{"dense": true, "widths": [4, 8], "scale": 0.5, "label": "a=b: 'c' 😀"}""",
    "json.dumps": json.dumps(ARGUMENTS),
}
NET = f"""
from torch import nn

def net(num_classes, **kwargs):
    assert kwargs == {ARGUMENTS!r}, kwargs
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_tables_are_toml_or_json(spelling: str) -> None:
    assert read_value(SPELLINGS[spelling]) == ARGUMENTS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2]", [1, 2]),
        ('[{"a": 1}, {"b": [true]}]', [{"a": 1}, {"b": [True]}]),
        ("[{a = 1}]", [{"a": 1}]),
        ('"\\ud83d\\ude00"', "😀"),  # JSON's escape of what has no place in 16 bits
        ("null", "null"),
        ("{dense: true}", "{dense: true}"),  # neither
        ("[b", "[b"),
        ("x = 1", "x = 1"),
        ("1\ny = 2", "1\ny = 2"),
        ("0.2", 0.2),
        ("N/10", "N/10"),
    ],
)
def test_a_value_is_toml_or_json_or_text(text: str, value: Any) -> None:
    assert read_value(text) == value


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NUMBERS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
VALUES = st.recursive(
    TEXT | NUMBERS | st.dates() | st.sampled_from(["1", "true", "[]", '"', "'a'", "--x", "inf", "1979-05-27", " a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
).filter(lambda value: not _has_what_json_lacks(value, inside=False))


def _has_what_json_lacks(value: Any, *, inside: bool) -> bool:
    """A date in a list or table, which are written as JSON: no key of a job file takes one there."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return any(_has_what_json_lacks(item, inside=True) for item in items)
    return inside and not isinstance(value, str | bool | int | float)


@given(st.dictionaries(st.sampled_from(["optim.lr", "data.root", "model.kwargs"]), VALUES, max_size=3))
def test_words_that_are_written_are_read_as_the_same_overrides(overrides: dict[str, Any]) -> None:
    words = shlex.split(shlex.join(["plan", "job.toml", *override_words(overrides)]))
    assert split_overrides(words) == (["plan", "job.toml"], overrides)


@pytest.fixture
def own_job(job: str) -> str:
    """A job whose network insists on `ARGUMENTS`."""
    tree = job_tree(Path("data").resolve())
    tree["model"] = {"name": "netto:net", "ghost_batch": 8}
    Path("netto.py").write_text(NET)
    Path("own.toml").write_text(tomli_w.dumps(tree))
    return "own.toml"


Finished = Callable[[str, str], None]


def _printed(out: str, err: str) -> None:
    assert json.loads(out)["job_file"]["model"]["kwargs"] == ARGUMENTS


def _submitted(out: str, err: str) -> None:
    assert "#SBATCH --job-name=small" in out


def _trained(out: str, err: str) -> None:
    assert tomllib.loads(Path("runs/small/job.toml").read_text())["model"]["kwargs"] == ARGUMENTS


def _verified(out: str, err: str) -> None:
    assert "agrees" in out


def _probed(out: str, err: str) -> None:
    assert json.loads(Path("P 1.json").read_text())["subject"]["model.kwargs"] == ARGUMENTS


COMMANDS: dict[str, tuple[list[str], int, Finished]] = {
    "plan": (["--json"], 0, _printed),
    "submit": (["--nodes-max", "1", "--dry-run"], 0, _submitted),
    "train": (["--max-updates", "1"], 75, _trained),
    "twin": (["--max-updates", "1"], 75, _trained),
    "verify": (["--layouts", "1x1x16", "--updates", "1"], 0, _verified),
    "probe": (["--out", "P 1.json", "--budget-s", "0.01"], 0, _probed),
}


# All commands get the parsed value from the same function: one command that plans and one that trains read both forms.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "spelling"), [*((name, "TOML") for name in COMMANDS), ("plan", "json.dumps"), ("train", "json.dumps")]
)
def test_every_command_reads_a_table(
    own_job: str, command: str, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, code, check = COMMANDS[command]
    assert main([command, own_job, "--model.kwargs", SPELLINGS[spelling], *words]) == code
    check(*capsys.readouterr())


@pytest.mark.parametrize(("value", "place"), [('{"a": null}', "a"), ('{"a": [1, null]}', "a.1")])
def test_null_is_refused_since_no_job_file_can_hold_it(
    own_job: str, value: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", own_job, "--model.kwargs", value]) == 2
    assert f"model.kwargs.{place}: must have a value, got null" in capsys.readouterr().err


def test_the_command_that_probe_prints_plans_the_probed_job(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my job.toml").write_text(Path(job).read_text())
    given = ["--data.root", str(Path("data").resolve()), "--name", "other", "--seed", "5", "--optim.lr", "0.02"]
    given += ["--schedule.boundaries-epochs", "[0.5, 1]"]
    assert main(["probe", "my job.toml", *given, "--out", "P 1.json", "--budget-s", "0.01"]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    program, *words = shlex.split(line.partition("P 1.json is written. To use it: ")[2])
    assert program == "hvd-batchgrow"
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["plan", "my job.toml", *given, "--cost", "P 1.json", "--json"]) == 0
    assert found == json.loads(capsys.readouterr().out)
    assert (found["job"], found["job_file"]["seed"], found["phases"][0]["lr"]) == ("other", 5, 0.02)
    assert [phase["start_epoch"] for phase in found["phases"]] == [0, 0.5, 1]


def test_commands_in_messages_are_quoted_for_a_shell(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = "my 'runs'"
    assert main(["train", job, "--runs-dir", runs, "--max-updates", "1"]) == 75
    assert main(["advise", f"{runs}/small"]) == 1
    command = capsys.readouterr().err.partition("as another run: ")[2].splitlines()[0]
    assert shlex.split(command)[:3] == ["hvd-batchgrow", "train", f"{runs}/small/job.toml"]
    assert main(["plan", job, "--cost", "no 'probe'.json"]) == 1
    again = capsys.readouterr().err.partition("measure (again): ")[2]
    assert shlex.split(again) == ["hvd-batchgrow", "probe", "JOB", "--out", "no 'probe'.json"]
    submitted = measured_tree("data", {"name": "plateau", "patience_epochs": 1.0})
    Path("measured.toml").write_text(tomli_w.dumps(submitted))
    assert main(["submit", "measured.toml", "--nodes-max", "1", "--dry-run"]) == 2
    command = capsys.readouterr().err.partition("as one job: ")[2]
    assert 'arguments=("$@")' in Path(shlex.split(command)[3]).read_text()
