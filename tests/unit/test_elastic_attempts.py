"""An elastic run in one process with simulated changes of hosts; tests/launch/test_elastic.py has real ones."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.broadcast_object import map_state
from hvd_batchgrow.comm.devices import Placement, take_device
from hvd_batchgrow.comm.ranks import RanksLost, SingleRank
from hvd_batchgrow.observers.event_files import event_files, points_up_to
from hvd_batchgrow.observers.tensorboard_hparams import HPARAMS_TAGS
from hvd_batchgrow.train.checkpoints.checkpoint import newest_good
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.run import RunOptions, _has_checkpoint
from hvd_batchgrow.train.train_state import TrainState
from hvd_batchgrow.train.trainer import Trainer
from hvd_batchgrow.verification.audit import read_consumed
from tests.helpers import job_tree, measured_tree


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


def final_state(name: str) -> tuple[object, ...]:
    """Return the last checkpoint of a run as plain values, without its time; its evaluations and kept best weights."""
    checkpoint = newest_good(Path("runs", name, "checkpoints"))[0]
    assert checkpoint is not None
    lines = map(json.loads, Path("runs", name, "metrics.jsonl").read_text().splitlines())
    state = map_state(torch.Tensor.tolist, vars(replace(checkpoint, elapsed_s=0.0)))
    bests = sorted(path.name for path in Path("runs", name, "checkpoints").glob("best-*"))
    return state, [line for line in lines if line["kind"] == "eval"], bests


def assert_equal_runs() -> None:
    """The run `small` has ended as `undisturbed` has, which lost no rank."""
    assert final_state("small") == final_state("undisturbed")


class Losing(SingleRank):
    """Ranks are lost once, in a call of a collective: the first one is 1."""

    elastic = True

    def __init__(self, collective: str = "", call: int = 0) -> None:
        self.lose_in, self.calls, self.attempts = (collective, call), Counter[str](), 1

    def start_all_reduce(self, tensor: torch.Tensor, name: str) -> None:
        self.calls[name] += 1
        if (name, self.calls[name]) == self.lose_in and self.attempts == 1:
            raise RanksLost

    def broadcast_from_rank0(self, produce: Callable[[], bytes], name: str) -> bytes:
        message = super().broadcast_from_rank0(produce, name)
        self.start_all_reduce(torch.zeros(1), name)  # rank 0 may know the message already
        return message

    def reform(self) -> None:
        self.attempts += 1


def train(monkeypatch: pytest.MonkeyPatch, ranks: SingleRank, *arguments: str) -> int:
    """Run `train` as an elastic job on these ranks."""
    monkeypatch.setitem(sys.modules, "hvd_batchgrow.comm.elastic", SimpleNamespace(ElasticRanks=type(ranks)))
    monkeypatch.setattr("hvd_batchgrow.comm.backend.connect", lambda *_: ranks)
    return main(["train", *arguments])


def assert_unaffected(monkeypatch: pytest.MonkeyPatch, job: str, collective: str, call: int) -> None:
    """Ranks that are lost in a call of a collective change neither the last checkpoint nor the evaluations."""
    assert train(monkeypatch, Losing(), job, "--name", "undisturbed") == 0
    ranks = Losing(collective, call)

    def agree(*_: object) -> None:
        ranks.start_all_reduce(torch.zeros(1), "agreement")

    monkeypatch.setattr("hvd_batchgrow.train.trainer.check_agreement", agree)  # one rank agrees with itself
    assert train(monkeypatch, ranks, job) == 0
    assert ranks.attempts == 2, ranks.calls
    assert_equal_runs()


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


@pytest.mark.slow
def test_ranks_lost_while_an_attempt_starts(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt loses ranks before its start, so it keeps no state."""
    assert train(monkeypatch, Losing(), job, "--name", "undisturbed") == 0
    begin, states = TrainState.begin, list[TrainState]()

    def lose(state: TrainState, *arguments: object) -> list[str]:
        states.append(state)
        if len(states) == 1:
            raise RanksLost
        return begin(state, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainState, "begin", lose)
    assert train(monkeypatch, ranks := Losing(), job) == 0
    assert (ranks.attempts, len(states)) == (2, 2)
    assert_equal_runs()


@pytest.mark.parametrize("resume", [False, True])
def test_every_rank_votes_on_the_checkpoint_whatever_its_options(tmp_path: Path, resume: bool) -> None:
    """Ranks that have lost others must resume; a rank that joins has the options of its command."""
    ranks = Losing()
    assert not _has_checkpoint(tmp_path, RunOptions(tmp_path, resume=resume), ElasticState(), ranks)
    assert ranks.calls == {"any": 1}


def test_a_rank_that_joins_accepts_the_checkpoint_of_rank_0(tmp_path: Path) -> None:
    class Joining(Losing):
        rank, size = 1, 2

        def start_all_reduce(self, tensor: torch.Tensor, name: str) -> None:
            assert tensor.tolist() == [0]
            tensor.fill_(1)  # rank 0 has a checkpoint

    assert _has_checkpoint(tmp_path, RunOptions(tmp_path), ElasticState(), Joining())


@pytest.mark.slow
def test_ranks_lost_before_the_folder_is_open_do_not_continue_another_run(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, Losing(), job, "--max-updates", "2") == 75
    assert train(monkeypatch, ranks := Losing("cores", 1), job) == 1
    assert ranks.attempts == 2
    assert "runs/small holds a run already" in capsys.readouterr().err
    assert train(monkeypatch, ranks := Losing("cores", 1), job, "--overwrite", "--max-updates", "3") == 75
    assert ranks.attempts == 2
    assert read_consumed(Path("runs/small")).bounds.tolist() == [0, 16, 32, 48]
    (attempt,) = json.loads(Path("runs/small/record.json").read_text())["attempts"]
    assert attempt["start_samples"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("collective", "call", "sections"),
    [
        ("evaluation", 5, {}),  # the final one
        ("running statistics", 4, {"model": {"precise_bn_samples": 64}}),
        ("evaluation", 3, {"checkpoint": {"keep_best": "val/loss"}, "data": {"validation_fraction": 0.2}}),
        ("agreement", 3, {"checkpoint": {"keep_best": "val/loss"}, "data": {"validation_fraction": 0.2}}),
    ],
)
def test_ranks_lost_after_an_update_lose_nothing_that_follows_it(
    job: str, monkeypatch: pytest.MonkeyPatch, collective: str, call: int, sections: dict[str, dict[str, object]]
) -> None:
    """Before, what was due after the update was skipped, because the next attempt began with the next update."""
    Path(job).write_text(tomli_w.dumps(job_tree("data", **sections, evaluation={"every_epochs": 0.4})))
    assert_unaffected(monkeypatch, job, collective, call)


@pytest.mark.slow
def test_a_run_that_loses_ranks_in_its_last_evaluation_is_not_done(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard has the repeated evaluation once, and the results only of the end."""
    sections = {"evaluation": {"every_epochs": 0.4}, "logging": {"tensorboard": True}}
    Path(job).write_text(tomli_w.dumps(job_tree("data", **sections)))
    assert train(monkeypatch, Losing("evaluation", 5), job) == 0
    shown = capsys.readouterr().err
    assert (shown.count("small: stopped after"), shown.count("small: done:")) == (1, 1)
    points = points_up_to(event_files(Path("runs/small")), 10**9, frozenset())
    tags = [(value.tag, event.step) for event in points for value in event.summary.value]
    assert tags.count(("val/loss", 688)) == 1
    assert sum("hparams" in tag for tag, _ in tags) == len(HPARAMS_TAGS)


@pytest.mark.slow
@pytest.mark.parametrize(("collective", "call"), [("evaluation", 3), ("running statistics", 1), ("decision", 5)])
def test_ranks_lost_at_a_decision_change_no_decision(
    job: str, monkeypatch: pytest.MonkeyPatch, collective: str, call: int
) -> None:
    """The decision restores the best weights, and the statistics are estimated again after it."""
    trigger = {"name": "plateau", "metric": "loss", "patience_epochs": 0.3, "restore_best": True}
    sections = {"evaluation": {"every_epochs": 0.3}, "model": {"precise_bn_samples": 64}}
    Path(job).write_text(tomli_w.dumps(measured_tree("data", trigger, **sections)))
    assert_unaffected(monkeypatch, job, collective, call)
    decisions = map(json.loads, Path("runs/small/decisions.jsonl").read_text().splitlines())
    assert any(decision.get("restore_samples") for decision in decisions)


@pytest.mark.slow
def test_plan_json_has_the_ranks_of_the_job_file_after_a_decision(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """discover-hosts.sh reads from it how many ranks the job can use, whatever number trains it."""
    layout = {"max_micro_batch": 8, "threads_per_rank": 1, "grow_by": "ranks", "max_ranks": 3}
    Path(job).write_text(tomli_w.dumps(measured_tree("data", {"name": "norm_test"}, layout=layout)))
    for resume in ((), ("--resume", "auto")):
        assert train(monkeypatch, Losing(), job, *resume) == 0
        shown = json.loads(Path("runs/small/plan.json").read_text())
        phases = {phase["global_batch"]: phase["ranks"] for phase in shown["phases"]}
        assert phases == {batch: 2 if batch // 8 % 3 else 3 for batch in phases}  # ghost batches of 8 in equal shares
        assert (phases[16], phases[96]) == (2, 3)
        assert shown["job_file"]["layout"]["grow_by"] == "ranks"


class Joined(SingleRank):
    """This rank has joined a run of which another rank has counted 5 updates."""

    elastic = True

    def all_gather(self, numbers: Sequence[int], name: str) -> torch.Tensor:
        own = super().all_gather(numbers, name)
        return torch.cat([own, torch.tensor([[5]])]) if name == "updates so far" else own


def test_a_rank_that_joins_counts_the_updates_before_it_joined(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(monkeypatch, Joined(), job, "--max-updates", "7") == 75
    assert read_consumed(Path("runs/small")).bounds.tolist() == [0, 16, 32]
