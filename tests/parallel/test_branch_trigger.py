"""A run that pauses to train branches: it decides by them, and continues as if it had known the decision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from hvd_batchgrow.cli.train import TrainCommand
from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.schedule.adaptive.decisions import Decision, read_decisions
from hvd_batchgrow.train import growth_controller, trainer
from hvd_batchgrow.train.checkpoints.checkpoint import checkpoint_at, newest_good
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.train.liveness.watchdog import Heartbeat
from hvd_batchgrow.train.run.decision_record import write_decisions
from hvd_batchgrow.verification.audit import audit, compare_orders, read_consumed
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests.helpers import measured_tree, small_source, write_idx_folder
from tests.training import StopAfter

TRIGGER: dict[str, Any] = {"name": "branch", "factors": [1, 2], "branch_samples": 512, "tolerance": 1000.0}
"""One round fits the budget of 36 epochs: at sample 304, 2 branches of 512 samples. Its tolerance lets k = 2 pass."""
SECTIONS: dict[str, Any] = {"schedule": {"epochs": 36.0, "lr_rule": "linear"}, "evaluation": {"every_epochs": 0.5}}
UPDATES = 30
"""The run is stopped there: 19 updates of 16 before the round, then 11 of 32."""


@pytest.fixture(scope="module")
def here(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 0's folder, with the data."""
    own = str(tmp_path_factory.mktemp("branch-trigger"))
    folder = Path(ranks.broadcast_bytes(own.encode(), "test.folder").decode())
    if ranks.rank == 0:
        write_idx_folder(folder / "data", small_source())
    ranks.any(flag=False)  # the files are written
    return folder


def command(ranks: Ranks, here: Path, name: str, trigger: dict[str, Any] = TRIGGER, **options: Any) -> TrainCommand:
    """The command that trains the job under a name."""
    sections = SECTIONS | options.pop("sections", {})
    if ranks.rank == 0:
        (here / f"{name}.toml").write_text(tomli_w.dumps(measured_tree(here / "data", trigger, name=name, **sections)))
    ranks.any(flag=False)  # the file is written
    return TrainCommand(here / f"{name}.toml", runs_dir=here / "runs", **({"max_updates": UPDATES} | options))


def run(command: TrainCommand, ranks: Ranks, stop: Any = None) -> ExitCode:
    return command.train_alone(ranks, stop or StopRequest(), {})


def weights(ranks: Ranks, folder: Path) -> str:
    """The digest of rank 0's newest checkpoint."""

    def read() -> bytes:
        checkpoint, _ = newest_good(folder / "checkpoints")
        assert checkpoint is not None
        return f"{checkpoint.samples} {tree_digest([checkpoint.model, checkpoint.optimizer])}".encode()

    return ranks.broadcast_from_rank0(read, "test.digest").decode()


def decisions(ranks: Ranks, folder: Path) -> bytes:
    return ranks.broadcast_from_rank0((folder / "decisions.jsonl").read_bytes, "test.decisions")


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, here: Path) -> Path:
    """The folder of a run that nothing has happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVD_BATCHGROW_CACHE", str(here / "cache"))
        assert run(command(ranks, here, "whole"), ranks) == ExitCode.STOPPED
    return here / "runs/whole"


@pytest.fixture(autouse=True)
def cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(here / "cache"))


def test_the_batch_grows_to_what_the_branches_show(ranks: Ranks, undisturbed: Path) -> None:
    assert weights(ranks, undisturbed).split()[0] == str(304 + 11 * 32)
    if ranks.rank:
        return
    (decision,) = read_decisions(undisturbed / "decisions.jsonl")[1]
    assert (decision.samples, decision.old_batch, decision.new_batch) == (304, 16, 32)
    branches = undisturbed / "branches/at-304-for-512-linear"
    means = []
    for factor in (1, 2):
        files = RunFiles.read(branches / f"k{factor}")
        rows = files.column("samples") > 304 + 256  # the second half counts
        assert rows.sum() == 16 // factor
        assert set(files.column("lr")[rows]) == {0.05 * factor}
        assert not [line for line in files.evaluations if line["samples"] > 304]
        means.append(np.mean(files.column("loss")[rows]))
    assert decision.measured["k2_difference"] == pytest.approx(means[1] - means[0])
    assert decision.measured["k2_low"] < means[1] - means[0] < decision.measured["k2_high"]
    assert (decision.measured["critical_batch"], decision.measured["k2_is_not_worse"]) == (32, 1)
    *_, result, none_left = read_lines(undisturbed / "branches.jsonl")
    assert result["table"]["critical_batch"] == 32
    # 36 epochs of 300 samples times 0.1, without 2 branches of 512; and 2 branches of 16 blocks of 64
    assert "56 of 1,080 samples of the budget are left" in none_left["text"]
    assert "take 2,048" in none_left["text"]
    assert RunFiles.read(undisturbed).plan["phases"][1]["lr"] == pytest.approx(0.1)
    parts = [read_consumed(path) for path in (undisturbed, branches / "k1", branches / "k2")]
    assert all(audit(part, lambda *_: None).passed for part in parts)
    assert "the same samples in the same order up to 816" in compare_orders(parts[1], parts[2])[1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_replay_trains_no_branches_and_gives_the_same_weights(ranks: Ranks, here: Path, undisturbed: Path) -> None:
    again = command(ranks, here, "again", replay=undisturbed / "decisions.jsonl")
    assert run(again, ranks) == ExitCode.STOPPED
    assert weights(ranks, here / "runs/again") == weights(ranks, undisturbed)
    if ranks.rank == 0:
        assert not (here / "runs/again/branches").exists()


def test_branches_that_do_not_pass_change_nothing(ranks: Ranks, here: Path) -> None:
    trained = command(ranks, here, "strict", TRIGGER | {"tolerance": 1e-9})
    assert run(trained, ranks) == ExitCode.STOPPED
    if ranks.rank == 0:
        assert not (here / "runs/strict/decisions.jsonl").exists()
        assert (here / "runs/strict/branches/at-304-for-512-linear/k2/metrics.jsonl").exists()
        # A kill now does not compare the branches again.
        after = checkpoint_at(here / "runs/strict/checkpoints", 304).growth["trigger"]
        assert (after["round_at"], after["spent_samples"]) == (None, 1024)
        (here / "none.jsonl").touch()
    plain = command(ranks, here, "plain", TRIGGER | {"tolerance": 1e-9}, replay=here / "none.jsonl")
    assert run(plain, ranks) == ExitCode.STOPPED
    assert weights(ranks, here / "runs/strict") == weights(ranks, here / "runs/plain")


@pytest.mark.parametrize("looks", [19, 20, 40, 60], ids=["at the round", "before k1", "in k1", "in k2"])
def test_a_stop_at_or_within_a_round_resumes_to_the_same_decision_and_weights(
    ranks: Ranks, here: Path, undisturbed: Path, looks: int
) -> None:
    name = f"stopped{looks}"
    stopped = command(ranks, here, name, max_updates=None)
    assert run(stopped, ranks, StopAfter(looks, here=ranks.rank == ranks.size - 1)) == ExitCode.STOPPED
    folder = here / "runs" / name
    assert weights(ranks, folder).split()[0] == "304"
    if ranks.rank == 0:
        assert not (folder / "decisions.jsonl").exists()
    rest = command(ranks, here, name, resume="auto", max_updates=UPDATES - 19)
    assert run(rest, ranks) == ExitCode.STOPPED
    assert decisions(ranks, folder) == decisions(ranks, undisturbed)
    assert weights(ranks, folder) == weights(ranks, undisturbed)
    if ranks.rank == 0:
        assert audit(read_consumed(folder), lambda *_: None).passed
        records = [folder / f"branches/at-304-for-512-linear/k{factor}/record.json" for factor in (1, 2)]
        attempts = [len(json.loads(path.read_text())["attempts"]) for path in records]
        assert attempts == {19: [1, 1], 20: [1, 1], 40: [2, 1], 60: [1, 2]}[looks]


def test_a_kill_between_the_decision_and_its_effect_changes_nothing(
    ranks: Ranks, here: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_die(folder: Path, source: str | None, made: Sequence[Decision]) -> None:
        write_decisions(folder, source, made)
        raise RunError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(growth_controller, "write_decisions", write_and_die)
        with pytest.raises(CollectiveError):
            run(command(ranks, here, "killed"), ranks)
    folder = here / "runs/killed"
    assert weights(ranks, folder).split()[0] == "304"
    rest = command(ranks, here, "killed", resume="auto", max_updates=UPDATES - 19)
    assert run(rest, ranks) == ExitCode.STOPPED
    assert decisions(ranks, folder) == decisions(ranks, undisturbed)
    assert weights(ranks, folder) == weights(ranks, undisturbed)


def test_a_round_reports_its_stages_and_its_branches_re_estimate_nothing(
    ranks: Ranks, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    estimates: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Heartbeat, "at", lambda _, stage: stages.append(stage))
        patch.setattr(trainer, "reestimate", lambda _parts, samples, *_: estimates.append(samples))
        assert run(command(ranks, here, "stages", max_updates=20), ranks) == ExitCode.STOPPED
    assert estimates == [304]  # the decision, and not the ends of the branches at sample 816
    assert stages.count("preparing a branch") == 3  # the round, and each branch
    assert stages.count("comparing the branches") == 1


def test_branches_train_on_the_ranks_of_the_phase_while_others_are_idle(ranks: Ranks, here: Path) -> None:
    sections = {"layout": {"grow_by": "ranks", "max_micro_batch": 16}}
    assert run(command(ranks, here, "ranks", sections=sections), ranks) == ExitCode.STOPPED
    if ranks.rank == 0:
        files = RunFiles.read(here / "runs/ranks")
        grown = files.column("global_batch") == 32
        assert set(files.column("ranks")[~grown]) == {1}
        assert set(files.column("ranks")[grown]) == {min(2, ranks.size)}
    replay = here / "runs/ranks/decisions.jsonl"
    assert run(command(ranks, here, "ranks-again", sections=sections, replay=replay), ranks) == ExitCode.STOPPED
    assert weights(ranks, here / "runs/ranks") == weights(ranks, here / "runs/ranks-again")
