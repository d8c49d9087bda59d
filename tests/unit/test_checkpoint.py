from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.checkpoints import checkpoint as checkpoint_module
from hvd_batchgrow.train.checkpoints.checkpoint import (
    FORMAT,
    Checkpoint,
    checkpoint_paths,
    newest_good,
    write_checkpoint,
)
from hvd_batchgrow.train.checkpoints.checkpoint_names import checkpoint_name
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests.training import bytes_of


def make(samples: int = 640) -> Checkpoint:
    generator = torch.Generator().manual_seed(samples)
    weights = {"w": torch.randn(4, 3, generator=generator), "n": torch.tensor(3)}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(4, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    deciding = {"seed": 0, "optim.lr": 0.1, "schedule.boundaries_epochs": [1.0], "schedule.max_batch": None}
    result = {"samples": 640, "loss": 0.5, "metrics": {"top1": 0.9}, "updates": 40, "dataset": "test"}
    evaluation = {**result, "average_loss": None, "average_metrics": {}}
    return Checkpoint(samples, deciding, weights, optimizer, 12.5, evaluation, {}, {}, 0)


def write(folder: Path, *counters: int, keep: int = 9, milestones: tuple[int, ...] = ()) -> None:
    for samples in counters:
        write_checkpoint(folder, make(samples), keep, milestones)


def test_a_checkpoint_is_read_back_unchanged() -> None:
    before, after = make(), Checkpoint.from_bytes(bytes_of(make()))
    assert (after.samples, after.deciding, after.elapsed_s, after.evaluation) == (
        before.samples,
        before.deciding,
        before.elapsed_s,
        before.evaluation,
    )
    assert tree_digest(after.model) == tree_digest(before.model)
    assert tree_digest(after.optimizer) == tree_digest(before.optimizer)


def test_old_checkpoints_are_removed_except_milestones(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30, 40, 50, keep=2, milestones=(20,))
    assert [int(path.stem[8:]) for path in checkpoint_paths(tmp_path)] == [20, 40, 50]
    good, skipped = newest_good(tmp_path)
    assert good is not None
    assert (good.samples, skipped) == (50, [])


def test_damaged_newer_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    write(tmp_path, 300)
    checkpoint_paths(tmp_path)[0].write_bytes(b"damaged")
    write(tmp_path, 100, 150, 200, keep=1)
    good, _ = newest_good(tmp_path)
    assert good is not None
    assert good.samples == 200


def _flipped(data: bytes, draw: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    damaged[draw.integers(0, len(data))] ^= 1 << draw.integers(0, 8)
    return bytes(damaged)


def _cut(data: bytes, draw: np.random.Generator) -> bytes:
    return data[: draw.integers(0, len(data))]


def _swapped(data: bytes, draw: np.random.Generator) -> bytes:
    """Swap two blocks of the file, as a faulty file system might."""
    size = 64
    while True:
        first, second = sorted(size * draw.integers(0, len(data) // size, 2))
        a, b = data[first : first + size], data[second : second + size]
        if a != b:
            return data[:first] + b + data[first + size : second] + a + data[second + size :]


def _zeroed(data: bytes, draw: np.random.Generator) -> bytes:
    """Zero a page, as if it had not reached the disk."""
    while True:
        start = int(draw.integers(0, len(data) - 512))
        if data[start : start + 512].strip(b"\0"):
            return data[:start] + bytes(512) + data[start + 512 :]


def _foreign(data: bytes, draw: np.random.Generator) -> bytes:
    return [draw.bytes(len(data)), _saved({"state_dict": {"w": torch.ones(3)}}), b"#!/bin/sh\n"][draw.integers(0, 3)]


def _newer(data: bytes, draw: np.random.Generator) -> bytes:
    return _sealed(_resaved(format=FORMAT + int(draw.integers(1, 9))))


def assert_skipped(folder: Path, reason: str) -> None:
    """Check that the newest checkpoint is skipped with a reason, and the one at 10 samples used."""
    good, skipped = newest_good(folder)
    assert good is not None
    assert good.samples == 10
    assert len(skipped) == 1
    assert skipped[0].startswith(reason)


@pytest.mark.parametrize("damage", [_flipped, _cut, _swapped, _zeroed, _foreign, _newer])
def test_every_damaged_checkpoint_is_detected_reported_and_skipped(
    tmp_path: Path, damage: Callable[[bytes, np.random.Generator], bytes]
) -> None:
    write(tmp_path, 10, 20)
    newest, draw = checkpoint_paths(tmp_path)[-1], np.random.default_rng(0)
    data = newest.read_bytes()
    for _ in range(40):  # 240 over all kinds of damage
        newest.write_bytes(damage(data, draw))
        assert_skipped(tmp_path, f"{newest}: ")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "cut short, or not a checkpoint"),
        (lambda data: b"", "cut short, or not a checkpoint"),
        (lambda data: data[:-1], "cut short, or not a checkpoint"),
        (lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:], "damaged: its bytes do not match its SHA-256"),
        (lambda data: _sealed(_resaved(format=5)), "its format is 5, but this version reads format 6"),
        (lambda data: _sealed(b"text"), "not readable"),
        (lambda data: _saved({"state_dict": {}}), "cut short, or not a checkpoint of this program"),
        (lambda data: _sealed(_saved({"state_dict": {}})), "not a checkpoint of this program"),
    ],
)
def test_a_bad_checkpoint_is_skipped_with_its_reason_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    write(tmp_path, 10, 20)
    newest = checkpoint_paths(tmp_path)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert_skipped(tmp_path, f"{newest}: {reason}")


def test_pipes_and_folders_are_skipped_without_blocking(tmp_path: Path) -> None:
    write(tmp_path, 10)
    os.mkfifo(tmp_path / f"samples-{20:015d}.pt")
    (tmp_path / f"samples-{30:015d}.pt").mkdir()
    good, skipped = newest_good(tmp_path)
    assert good is not None
    assert good.samples == 10
    assert [line.rpartition("/")[2] for line in skipped] == [
        f"samples-{30:015d}.pt: Is a directory",
        f"samples-{20:015d}.pt: a pipe or device, where a file is needed",
    ]


def _saved(tree: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def _sealed(data: bytes) -> bytes:
    return data + b"\nsha256 " + hashlib.sha256(data).hexdigest().encode() + b"\n"


def _resaved(**changes: Any) -> bytes:
    return _saved({**torch.load(io.BytesIO(bytes_of(make())), weights_only=True), **changes})


def test_only_damaged_checkpoints_are_an_error_but_an_empty_folder_is_not(tmp_path: Path) -> None:
    assert newest_good(tmp_path) == (None, [])
    write(tmp_path, 10)
    checkpoint_paths(tmp_path)[0].write_bytes(b"x")
    with pytest.raises(RunError, match=r"no good checkpoint is left:\n  .*samples-000000000000010.pt: cut short"):
        newest_good(tmp_path)


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/hvd_batchgrow_hostile",)  # noqa: S108  # must not be created


@pytest.mark.parametrize("dump", [pickle.dumps, lambda value: _saved({"format": FORMAT, "model": value})])
def test_no_code_in_a_checkpoint_is_run(tmp_path: Path, dump: Callable[[Any], bytes]) -> None:
    with pytest.raises(RunError, match="not readable") as caught:
        Checkpoint.from_bytes(_sealed(dump(_Hostile())))
    assert "eights" not in str(caught.value), "torch's advice to load it without protection"
    assert not Path("/tmp/hvd_batchgrow_hostile").exists()  # noqa: S108


def test_a_failed_write_keeps_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"samples-000000000000020.pt could not be written: No space left on device"):
        write(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["samples-000000000000010.pt"]


def test_the_digest_depends_on_values_names_types_and_shapes() -> None:
    tree = {"a": torch.arange(6.0), "b": [1, None, "x"]}
    others = [
        {"a": torch.arange(6.0), "c": [1, None, "x"]},
        {"a": torch.arange(6.0).double(), "b": [1, None, "x"]},
        {"a": torch.arange(6.0).reshape(2, 3), "b": [1, None, "x"]},
        {"a": torch.arange(6.0) * 1.0000001, "b": [1, None, "x"]},
        {"a": torch.arange(6.0), "b": [1.0, None, "x"]},
        {"a": torch.arange(6.0), "b": [1, None]},
    ]
    assert len({tree_digest(other) for other in [tree, *others]}) == 7
    assert tree_digest({"b": [1, None, "x"], "a": torch.arange(6.0)}) == tree_digest(tree)
    transposed = torch.arange(6.0).reshape(3, 2).t().contiguous().t()
    assert tree_digest({"a": transposed}) == tree_digest({"a": torch.arange(6.0).reshape(3, 2)})


def test_an_elastic_restart_removes_no_checkpoint_of_a_phase_boundary(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    write(folder, 10, 20, 30, 40, keep=2, milestones=(10,))
    ElasticState(make(45)).write_if_newer(tmp_path)
    assert [int(path.stem[8:]) for path in checkpoint_paths(folder)] == [10, 30, 40, 45]
    ElasticState(make(43)).write_if_newer(tmp_path)
    assert len(checkpoint_paths(folder)) == 4


def test_an_old_checkpoint_that_is_already_gone_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 8, 24)
    # The listing of a folder on NFS may be older than a removal by another host.
    monkeypatch.setattr(checkpoint_module, "saved_samples", lambda folder: [8, 16, 24, 32])
    write(tmp_path, 32, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(24), checkpoint_name(32)]


def test_the_page_on_checkpoints_gives_their_format() -> None:
    page = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
    (stated,) = re.findall(r"`format` \| (\d+)", page.partition("### The file of a checkpoint")[2])
    assert int(stated) == FORMAT
