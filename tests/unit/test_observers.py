"""`logging.observers`: the user's own observers and those of services, which never change a run."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.observers import load_observers
from hvd_batchgrow.observers.load_observers import GuardedObserver, check_observers
from hvd_batchgrow.storage.json_lines import read_json_lines
from hvd_batchgrow.train.events import Observer
from hvd_batchgrow.verification.digest import final_weights
from tests.helpers import small_job

RUN = Path("runs/small")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlfow", r"did you mean 'mlflow'\? one of mlflow, wandb, or your own module:name"),
        ("WandB", r"did you mean 'wandb'\?"),
        ("tensorboard", r"logging\.tensorboard"),
        ("observers.Mine", r"did you mean 'observers:Mine'\?"),
        ("my observer:Class", "one of mlflow, wandb, or your own module:name"),
    ],
)
def test_a_name_is_checked_with_the_job_file(name: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        small_job(logging={"observers": [name]})


def test_observers_do_not_affect_the_weights() -> None:
    assert small_job(logging={"observers": ["mlflow"]}).deciding(300) == small_job().deciding(300)


def test_all_observers_that_cannot_be_imported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_observers, "find_spec", lambda name: None)
    with pytest.raises(JobError) as raised:
        check_observers(["mlflow", "tests.own_observers:Line", "no_such_module:Line", "wandb"])
    assert [(fault.path, fault.message.partition(":")[0]) for fault in raised.value.faults] == [
        ("logging.observers[0]", "mlflow is not installed"),
        ("logging.observers[1]", "tests.own_observers"),
        ("logging.observers[2]", "no_such_module"),
        ("logging.observers[3]", "wandb is not installed"),
    ]
    text = str(raised.value)
    assert "pip install 'hvd_batchgrow[mlflow]'" in text
    assert "did you mean tests.own_observers:Lines?" in text


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_missing_observer_is_reported_by_the_plan_and_before_training(
    job: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, job, "--logging.observers", '["tests.own_observers:Line"]']) == 2
    assert "logging.observers[0]: tests.own_observers:Line: tests.own_observers does not" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NeedsFile", r"NeedsFile\(\) failed: FileNotFoundError.*own_observers.py, line"),
        ("not_an_observer", "must return an Observer of hvd_batchgrow.train.events; it returned dict"),
        ("Misspelt", "has the method on_evalution, which is not an event; did you mean on_evaluation?"),
    ],
)
def test_an_observer_that_cannot_be_created_is_an_error_before_training(
    job: str, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", job, "--logging.observers", f'["tests.own_observers:{name}"]']) == 2
    assert not list(Path("runs").glob("small/*"))
    assert re.search(message, capsys.readouterr().err)


def test_the_observer_of_the_documentation_works(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "observers.md").read_text()
    Path("my_observers.py").write_text(text.split("```python\n")[1].split("```")[0])
    mail = Path("bin/mail")
    mail.parent.mkdir()
    mail.write_text('#!/bin/sh\necho "$@" >mail.txt; cat >>mail.txt\n')
    mail.chmod(0o755)
    monkeypatch.setenv("PATH", f"{mail.parent.resolve()}:{os.environ['PATH']}")
    monkeypatch.setenv("USER", "someone")
    assert main(["train", job, "--logging.observers", '["my_observers:Email"]']) == 0
    sent = Path("mail.txt").read_text().splitlines()
    assert sent[0] == "-s small someone"
    assert re.fullmatch(r"small: 17 of 17 updates; epoch 2\.3: \{'loss': .*, 'top1': .*\}", sent[1])


def train(job: str, observer: str, *options: str) -> dict[str, Any]:
    """Train with an observer; return the run's lines, metrics.jsonl without times, and digest."""
    assert main(["train", job, "--logging.observers", f'["tests.own_observers:{observer}"]', *options]) in (0, 75)
    lines = RUN / "lines.txt"
    records = [
        {key: value for key, value in line.items() if not key.endswith(("_s", "_pct"))}
        for line in read_json_lines(RUN / "metrics.jsonl")
    ]
    return {"lines": lines.read_text().splitlines(), "metrics": records, "digest": final_weights(RUN).digest}


def test_an_own_observer_receives_copies_of_all_events(job: str) -> None:
    assert main(["train", job, "--layout.exact", "true"]) == 0
    plain = [line["top1"] for line in read_json_lines(RUN / "metrics.jsonl")]
    seen = train(job, "Lines", "--layout.exact", "true", "--overwrite")
    assert [line["top1"] for line in seen["metrics"]] == plain
    lines = seen["lines"]
    assert lines[0] == "start 0"
    assert lines[-1] == "end 688"
    evaluations = [line for line in seen["metrics"] if line["kind"] == "eval"]
    assert [line for line in lines if line.startswith("evaluation")] == [
        f"evaluation {line['samples']} ['top1']" for line in evaluations
    ]
    assert sum(line.startswith("record") for line in lines) == len(seen["metrics"]) - len(evaluations)


def test_an_observer_that_fails_is_reported_once_and_the_run_continues(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(job, "Lines")
    capsys.readouterr()
    seen = train(job, "Unreachable", "--overwrite")
    text = capsys.readouterr().err
    assert text.count("no route to host") == 1
    assert (
        "the observer tests.own_observers:Unreachable failed in on_record: ConnectionError: no route to host " in text
    )
    assert "it receives no more events, and training continues" in text
    assert seen["metrics"] == expected["metrics"]
    assert seen["digest"] == expected["digest"]
    assert seen["lines"][0] == "start 0"
    assert len(seen["lines"]) < len(expected["lines"])


class Copied:
    """An event that counts its copies."""

    num_copies = 0

    def __deepcopy__(self, memo: object) -> Copied:
        Copied.num_copies += 1
        return self


def test_an_observer_that_ends_the_process_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Exits(Observer):
        def on_record(self, event: object) -> None:
            sys.exit("no more space")

    GuardedObserver("own", Exits(), print).on_record(Copied())  # type: ignore[arg-type]
    assert "the observer own failed in on_record: " in capsys.readouterr().out


def test_events_that_an_observer_ignores_are_not_copied() -> None:
    class Records(Observer):
        def on_record(self, event: object) -> None:
            """Receive it."""

    Copied.num_copies = 0
    guarded = GuardedObserver("own", Records(), print)
    for _ in range(3):
        guarded.on_update(Copied())  # type: ignore[arg-type]
    guarded.on_record(Copied())  # type: ignore[arg-type]
    assert Copied.num_copies == 1
