"""`branch` on several ranks: rank 0 reads the run, all train the branches and stop together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.cli.branch import BranchCommand
from hvd_batchgrow.cli.train import TrainCommand
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.messages.errors import ExitCode
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.verification.audit import audit, compare_orders, read_consumed
from tests.helpers import job_tree, small_source, write_idx_folder
from tests.training import StopAfter


def test_branches_are_stopped_resumed_and_compared_on_all_ranks(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(ranks.broadcast_bytes(str(tmp_path).encode(), "test.folder").decode())
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(folder / "cache"))
    sections: dict[str, Any] = {"layout": {"uneven_ranks": True}, "schedule": {"global_batch": 48, "max_batch": 48}}
    if ranks.rank == 0:
        write_idx_folder(folder / "data", small_source())
        (folder / "job.toml").write_text(tomli_w.dumps(job_tree(folder / "data", **sections)))
    else:  # only rank 0 may look at the run folders

        def refuse(folder: Path) -> RunFiles:
            raise AssertionError(f"rank {ranks.rank} reads {folder}")

        monkeypatch.setattr(RunFiles, "read", refuse)
        monkeypatch.setattr("hvd_batchgrow.train.run.branch_folders.read_plan", refuse)
    ranks.any(flag=False)  # the files are written
    run = folder / "runs/small"
    train = TrainCommand(folder / "job.toml", runs_dir=folder / "runs")
    assert train.train_alone(ranks, StopRequest(), {}) == ExitCode.DONE
    branch = BranchCommand(run, at=192, factors="1,2", samples=1600, json=True)
    stop = StopAfter(20, here=ranks.rank == ranks.size - 1)
    assert branch.train_and_compare(ranks, stop) == ExitCode.STOPPED
    capsys.readouterr()
    assert branch.train_and_compare(ranks, StopRequest()) == ExitCode.DONE
    found = run / "branches/at-192-for-1632-linear"
    if ranks.rank == 0:
        table = json.loads(capsys.readouterr().out)
        assert [(row["factor"], row["updates"], row["ranks"]) for row in table["branches"]] == [
            (1, 34, ranks.size),
            (2, 17, ranks.size),
        ]
        assert len(json.loads((found / "k1/record.json").read_text())["attempts"]) == 2
        parts = [read_consumed(path) for path in (run, found / "k1", found / "k2")]
        assert all(audit(part, lambda *_: None).passed for part in parts)
        assert "the same samples in the same order up to 1,824" in compare_orders(parts[1], parts[2])[1]
    assert branch.train_and_compare(ranks, StopRequest()) == ExitCode.DONE
