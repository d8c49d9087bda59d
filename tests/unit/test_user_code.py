"""The record of the user's code that is in no git checkout."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.train.run.user_code import user_code
from tests.unit.test_comparison import compared, pairs
from tests.unit.test_confounds import with_attempts

OBSERVER = (
    """import recorded_helper\nfrom hvd_batchgrow.train.events import Observer\n\n\nclass See(Observer):\n    pass\n"""
)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an observer and a module that it imports. Neither is in `sys.modules` before the test."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recorded_observer.py").write_text(OBSERVER)
    (tmp_path / "recorded_helper.py").write_text("x = 1\n")
    for name in ("recorded_observer", "recorded_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_resume_names_the_files_that_have_changed_outside_git(
    job: str, modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The defect: a run that began with one network was continued with another of the same shape, without a word."""
    words = ["train", "small.toml", "--logging.observers", '["recorded_observer:See"]', "--max-updates", "1"]
    assert main(words) == 75
    record = json.loads(Path("runs/small/record.json").read_text())
    code = record["attempts"][-1]["user_code"]
    assert code == {
        "recorded_helper.py": hashlib.sha256(b"x = 1\n").hexdigest(),
        "recorded_observer.py": hashlib.sha256(OBSERVER.encode()).hexdigest(),
    }
    (modules / "recorded_helper.py").write_text("x = 2\n")
    assert main([*words, "--resume", "auto"]) == 75
    assert "changed since the last attempt: recorded_helper.py\n" in capsys.readouterr().err
    assert main([*words, "--resume", "auto"]) == 75
    assert "changed since the last attempt: recorded" not in capsys.readouterr().err


def test_packages_that_a_job_names_are_recorded_wherever_they_are(
    modules: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    __import__("recorded_observer")
    (path,) = user_code({"logging": {"observers": ["recorded_observer:See"]}, "model": {"name": "resnet8"}})
    assert path == str(modules / "recorded_observer.py")
    assert user_code({"data": {"source": "numpy"}}) == {}


def test_installed_packages_are_not_the_users_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(np.__file__).parents[2])
    assert [path for path in user_code({"model": {"name": "numpy:array"}}) if path.startswith("site-packages")] == []
    monkeypatch.chdir(Path(json.__file__).parents[1])
    assert [path for path in user_code({}) if path.startswith("json")] == []


def test_a_comparison_names_files_that_differ(tmp_path: Path) -> None:
    first, second = pairs(tmp_path, [0.1])
    codes = ({"net.py": "ab", "loss.py": "cd"}, {"net.py": "xy", "loss.py": "cd", "other.py": "e"})
    runs = [with_attempts(run, [{"user_code": code}]) for run, code in zip((first, second), codes, strict=True)]
    assert "the user's code differs: net.py" in compared(runs).notes
    runs = [with_attempts(run, [{"user_code": code}]) for run, code in zip((first, second), (3, {}), strict=True)]
    assert not any("code" in note for note in compared(runs).notes)
