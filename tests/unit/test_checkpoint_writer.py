"""Checkpoints in the background: their content, when training waits, and where failures are raised."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.checkpoints import writer as module
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths, newest_good, write_checkpoint
from hvd_batchgrow.train.checkpoints.writer import CheckpointWriter, HostCopies
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests.unit.test_checkpoint import make


class Gate:
    """Blocks writes until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open, self.running, self.most = threading.Event(), threading.Event(), 0, 0

        def blocked(*arguments: Any) -> Path:
            self.running += 1
            self.most = max(self.most, self.running)
            self.entered.set()
            assert self.open.wait(30)
            self.running -= 1
            return write_checkpoint(*arguments)

        monkeypatch.setattr(module, "write_checkpoint", blocked)


def read(folder: Path) -> Checkpoint:
    checkpoint, _ = newest_good(folder)
    assert checkpoint is not None
    return checkpoint


def test_a_checkpoint_holds_the_state_at_the_time_of_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, live, kept = Gate(monkeypatch), make(10), make(10)
    with CheckpointWriter(tmp_path, 3, ()) as writer:
        writer.save(live)
        assert gate.entered.wait(30)
        live.model["w"].zero_()  # training continues while the write is blocked
        live.optimizer["state"][0]["momentum_buffer"].zero_()
        live.optimizer["param_groups"][0]["lr"] = 9.0
        writer.check()
        assert not checkpoint_paths(tmp_path)
        gate.open.set()
    after = read(tmp_path)
    assert tree_digest([after.model, after.optimizer]) == tree_digest([kept.model, kept.optimizer])


def test_one_write_runs_at_a_time_and_all_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    threading.Timer(0.2, gate.open.set).start()
    with CheckpointWriter(tmp_path, 9, ()) as writer:
        for samples in (10, 20, 30):
            writer.save(make(samples))
    assert gate.most == 1
    assert [Checkpoint.from_bytes(path.read_bytes()).samples for path in checkpoint_paths(tmp_path)] == [10, 20, 30]


def test_a_failure_is_raised_once_at_the_next_check(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    writer = CheckpointWriter(folder, 3, ())
    writer.save(make(10))
    writer.wait()
    shutil.move(folder, tmp_path / "elsewhere")
    writer.save(make(20))
    writer._thread.join()  # type: ignore[union-attr]
    message = r"checkpoints/samples-000000000000020.pt could not be written: No such file or directory"
    with pytest.raises(RunError, match=message):
        writer.check()
    writer.check()
    assert read(tmp_path / "elsewhere").samples == 10


@pytest.mark.parametrize("method", ["save", "wait", "exit"])
def test_every_failed_write_is_raised(tmp_path: Path, method: str) -> None:
    writer = CheckpointWriter(tmp_path / "gone", 3, ())

    def end() -> None:
        with writer:
            writer.save(make(10))
            if method == "save":
                writer.save(make(20))
            elif method == "wait":
                writer.wait()

    with pytest.raises(RunError, match=r"gone/samples-000000000000010.pt could not be written"):
        end()


def test_a_failing_run_waits_for_its_checkpoint_and_reports_both_failures(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with CheckpointWriter(folder, 3, ()) as writer:
            writer.save(make(10))
            raise ZeroDivisionError("the run's own")

    with pytest.raises(ZeroDivisionError, match="the run's own"):
        fail(tmp_path)
    assert read(tmp_path).samples == 10
    with pytest.raises(ZeroDivisionError) as caught:
        fail(tmp_path / "gone")
    assert "could not be written: No such file" in caught.value.__notes__[0]


def test_memory_is_reused_for_tensors_of_the_same_shape() -> None:
    copies = HostCopies()
    weights = {"w": torch.randn(3, 4).t(), "b": torch.arange(3)}
    first = copies.copy(weights)
    weights["w"].add_(1)
    weights["b"] = torch.arange(5)
    second = copies.copy(weights)
    assert second["w"].data_ptr() == first["w"].data_ptr()
    assert second["w"].stride() == weights["w"].stride()
    assert tree_digest(second) == tree_digest(weights)


def test_a_checkpoint_is_never_ahead_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    from hvd_batchgrow.storage import atomic
    from hvd_batchgrow.train.checkpoints import checkpoint

    sync = atomic.sync

    def record(path: Path) -> None:
        synced.append(path.name)
        sync(path)

    for place in (atomic, checkpoint):
        monkeypatch.setattr(place, "sync", record)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "consumed.jsonl").touch()
    with CheckpointWriter(tmp_path / "checkpoints", 3, ()) as writer:
        writer.save(make(10))
    assert synced == ["consumed.jsonl", "checkpoints"]
