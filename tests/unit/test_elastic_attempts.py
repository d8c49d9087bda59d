"""An elastic run in one process with simulated changes of hosts; tests/launch/test_elastic.py has real ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import RanksLost, SingleRank
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
