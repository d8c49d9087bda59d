"""`twin --seeds` on several ranks: all of them find the same runs finished, and stop and resume together."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from hvd_batchgrow.cli.train import TwinCommand
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.messages.errors import ExitCode
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.train.liveness.stop import StopRequest
from tests.helpers import job_tree, small_source, write_idx_folder
from tests.training import weights

NAMES = ["small-seed7", "small-seed7-twin", "small-seed8", "small-seed8-twin"]


def test_pairs_are_stopped_resumed_and_found_on_all_ranks(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(ranks.broadcast_bytes(str(tmp_path).encode(), "test.folder").decode())
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(folder / "cache"))
    if ranks.rank == 0:
        write_idx_folder(folder / "data", small_source())
        schedule = {"epochs": 1.2, "boundaries_epochs": [0.4, 0.8]}
        (folder / "job.toml").write_text(tomli_w.dumps(job_tree(folder / "data", schedule=schedule)))
    else:  # only rank 0 may look at the run folders

        def refuse(folder: Path) -> RunFiles:
            raise AssertionError(f"rank {ranks.rank} reads {folder}")

        monkeypatch.setattr(RunFiles, "read", refuse)
    ranks.any(flag=False)  # the files are written
    whole = TwinCommand(folder / "job.toml", seeds=2, runs_dir=folder / "whole")
    assert whole.train_pairs(ranks, StopRequest(), {}) == ExitCode.DONE
    parts = TwinCommand(folder / "job.toml", seeds=2, runs_dir=folder / "parts", resume="auto", max_updates=14)
    codes: list[ExitCode] = []
    while not codes or codes[-1] == ExitCode.STOPPED:
        codes.append(parts.train_pairs(ranks, StopRequest(), {}))
        assert len(codes) < 9
    assert codes[-1] == ExitCode.DONE
    assert len(codes) > 2
    assert ranks.all_gather(codes, "test.codes").tolist() == [codes] * ranks.size
    if ranks.rank == 0:
        assert [weights(folder / "parts" / name) for name in NAMES] == [
            weights(folder / "whole" / name) for name in NAMES
        ]
        assert capsys.readouterr().out.splitlines()[-1].startswith("verdict: not shown: ")
