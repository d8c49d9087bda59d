"""An elastic run in one process with simulated changes of hosts; tests/launch/test_elastic.py has real ones."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.devices import Placement, take_device
from hvd_batchgrow.comm.ranks import RanksLost, SingleRank
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.trainer import Trainer
from hvd_batchgrow.verification.audit import read_consumed


class Changing(SingleRank):
    """The hosts change at the second check of an attempt; the third attempt loses a rank in its first update."""

    elastic = True

    def __init__(self) -> None:
        self.attempts, self._checks = 1, 0

    def stop_requested_elsewhere(self) -> bool:
        self._checks += 1
        if self.attempts == 3:
            raise RanksLost
        return self._checks == 2

    def reform(self) -> None:
        self.attempts, self._checks = self.attempts + 1, 0


@pytest.mark.slow
def test_updates_are_counted_over_every_attempt(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Changing()
    monkeypatch.setitem(sys.modules, "hvd_batchgrow.comm.elastic", SimpleNamespace(ElasticRanks=Changing))
    monkeypatch.setattr("hvd_batchgrow.comm.backend.connect", lambda *_: ranks)
    assert main(["train", job, "--max-updates", "7"]) == 75
    assert ranks.attempts == 5
    # Two updates in each attempt that ended by a change of hosts, and 0 in the one that lost a rank.
    assert read_consumed(Path("runs/small")).bounds.tolist() == list(range(0, 7 * 16 + 1, 16))


def test_plan_json_of_an_elastic_run_has_the_ranks_of_its_job_file(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hvd_batchgrow.comm.elastic", SimpleNamespace(ElasticRanks=Changing))
    monkeypatch.setattr("hvd_batchgrow.comm.backend.connect", lambda *_: Changing())
    main(["train", job, "--max-updates", "1", "--layout.grow_by", "ranks", "--layout.max-ranks", "3"])
    shown = json.loads(Path("runs/small/plan.json").read_text())["phases"]
    assert [phase["ranks"] for phase in shown] == [1, 3, 3, 3]


@pytest.mark.slow
def test_each_attempt_agrees_on_devices_and_keeps_no_tensor_of_the_one_before(
    job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts end by a change of hosts, and one by lost ranks, whose state the next attempt resumes from."""
    agreed: list[Placement] = []
    networks: list[weakref.ref[torch.nn.Module]] = []
    alive: list[list[bool]] = []
    kept: list[ElasticState] = []

    def take(*arguments: object) -> Placement:
        alive.append([network() is not None for network in networks])
        agreed.append(take_device(*arguments))  # type: ignore[arg-type]
        return agreed[-1]

    def keep(trainer: Trainer) -> None:
        keep_for_next_attempt(trainer)
        kept.append(trainer.elastic)
        storages = {tensor.untyped_storage().data_ptr() for tensor in trainer.parts.model.state_dict().values()}
        assert trainer.elastic.checkpoint is not None
        copies = trainer.elastic.checkpoint.model
        assert {*map(str, copies)} == {*map(str, trainer.parts.model.state_dict())}
        assert not storages & {tensor.untyped_storage().data_ptr() for tensor in copies.values()}

    build = TrainingParts.__init__

    def remember(parts: TrainingParts, *arguments: object, **options: object) -> None:
        build(parts, *arguments, **options)  # type: ignore[arg-type]
        parts.model.__dict__["bound"] = parts.model.forward  # a cycle, as `torch.compile` and custom networks make
        networks.append(weakref.ref(parts.model))

    keep_for_next_attempt = Trainer._keep_for_next_attempt
    monkeypatch.setattr("hvd_batchgrow.train.run.setup.take_device", take)
    monkeypatch.setattr(TrainingParts, "__init__", remember)
    monkeypatch.setattr(Trainer, "_keep_for_next_attempt", keep)
    monkeypatch.setitem(sys.modules, "hvd_batchgrow.comm.elastic", SimpleNamespace(ElasticRanks=Changing))
    monkeypatch.setattr("hvd_batchgrow.comm.backend.connect", lambda *_: Changing())
    gc.disable()  # otherwise a collection may happen by chance
    try:
        assert main(["train", job, "--max-updates", "7"]) == 75
    finally:
        gc.enable()
    assert len(agreed) == len(networks) == 5
    assert alive == [[False] * attempt for attempt in range(5)]
    assert len(kept) == 1
