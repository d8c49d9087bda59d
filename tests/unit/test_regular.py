"""A pipe in the place of a file is reported immediately: opening it would wait for a writer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.results.plan_file import read_plan
from hvd_batchgrow.schedule.adaptive.decisions import read_decisions
from hvd_batchgrow.schedule.cost.probe_file import load_probe
from hvd_batchgrow.slurm.ledger import read_ledger
from hvd_batchgrow.storage.json_lines import JsonLines
from hvd_batchgrow.train.run.run_lock import RunLock
from hvd_batchgrow.verification.audit import read_consumed
from tests.helpers import plan_tree


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError("it waits for a writer")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read_consumed_of(path: Path) -> None:
    (path.parent / "plan.json").write_text(json.dumps(plan_tree(3, 9, seed=1)))
    read_consumed(path.parent)


READERS: dict[str, Callable[[Path], Any]] = {
    "plan.json": lambda path: read_plan(path.parent),
    "consumed.jsonl": read_consumed_of,
    "metrics.jsonl": lambda path: JsonLines(path, lambda line: True),
    "decisions.jsonl": read_decisions,
    "probe.json": load_probe,
    "slurm/ledger.json": lambda path: read_ledger(path.parents[1]),
}


@pytest.mark.parametrize("name", list(READERS))
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises((RunError, JobError), match=rf"{name}[^/]*a pipe or device, where a file is needed"):
        READERS[name](path)


def test_a_pipe_for_a_lock_is_reported(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".run.lock")
    with pytest.raises(RunError, match=r"a pipe or device, where a file is needed"):
        RunLock(tmp_path / "run").take()


def test_the_commands_say_so_and_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "plan.json")
    assert main(["audit", str(tmp_path)]) == 1
    job = Path(__file__).parents[2] / "jobs" / "fashion_mnist_quickstart.toml"
    assert main(["plan", str(job), "--ranks", "1", "--cost", str(tmp_path / "plan.json")]) == 1
    assert capsys.readouterr().err.count("a pipe or device, where a file is needed") == 2
