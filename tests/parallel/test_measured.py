"""Runs whose batch grows by what they measure: decided once, recorded, resumed and replayed to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_batchgrow.comm.hardware import hardware_of
from hvd_batchgrow.comm.ranks import CollectiveError, Ranks, SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.observers.metrics import ConsumedFile
from hvd_batchgrow.results.plan_file import read_plan
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest
from hvd_batchgrow.schedule.adaptive.decisions import Decision, decisions_text, read_decisions
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.trigger import Measurement
from hvd_batchgrow.train import growth_controller
from hvd_batchgrow.train import trainer as trainer_module
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.evaluate import evaluate
from hvd_batchgrow.train.events import EvaluatedSet, Evaluation, Observer
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.decision_record import write_decisions
from hvd_batchgrow.train.run.fork import Origin
from hvd_batchgrow.train.run.run_folder import open_run
from hvd_batchgrow.train.train_state import TrainState
from hvd_batchgrow.train.trainer import Trainer
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate
from hvd_batchgrow.verification.audit import audit, read_consumed
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests import training
from tests.golden import make_model
from tests.helpers import NUM_TRAIN, measured_job
from tests.training import Recorder, StopAfter, digest

NOISE = {"name": "gradient_noise", "ratio": 0.01, "every_epochs": 0.2, "hold_epochs": 0.3}
"""As B_simple is above a hundredth of the batch, it grows whenever that has held: 16, 32, 64, 96."""
PLATEAU = {"name": "plateau", "min_delta": 9.0, "patience_epochs": 0.5, "noise_factor": 2.0}
"""No evaluation is better by so much: it decides at every third, 16, 32, 64, 96 and then by the learning rate."""
BEST = {**PLATEAU, "restore_best": True}
TRIGGERS = [NOISE, PLATEAU, BEST]
ADASCALE = {"name": "adascale", "every_epochs": 0.2, "min_change": 0.01}
"""The batch is twice the base batch throughout; the gain moves the learning rate, which also decays once."""


def name_of(trigger: Any) -> str:
    return f"{trigger['name']}{'-best' * trigger.get('restore_best', False)}" if isinstance(trigger, dict) else ""


def job_of(trigger: dict[str, Any], **sections: Any) -> Job:
    sections = {
        "data": {"pipeline": "torch"},
        "evaluation": {"every_epochs": 0.25},
        "checkpoint": {"every_epochs": 0.5},
        "logging": {"logs_per_epoch": NUM_TRAIN},
        "schedule": {"batch_scale": 2.0, "lr_boundaries_epochs": [1.0]} if trigger["name"] == "adascale" else {},
    } | sections
    return measured_job(trigger, **sections)


def in_numbers(recorder: Recorder) -> list[tuple[float, ...]]:
    return [(r.samples, r.global_batch, r.accumulation, r.lr, r.loss) for r in recorder.records]


def train(job: Job, ranks: Ranks, folder: Path, *observers: Observer, **options: Any) -> Trainer:
    """Observed on rank 0 alone, as a run of a user's is."""
    return training.train(job, ranks, folder, *(observers if ranks.rank == 0 else ()), **options)[0]


def of_rank0(ranks: Ranks, read: Callable[[], bytes]) -> bytes:
    """What rank 0's folder holds; those of other ranks are empty."""
    return ranks.broadcast_from_rank0(read, "test.read")


def newest(ranks: Ranks, folder: Path) -> Checkpoint:
    found = training.newest(ranks, folder)
    assert found is not None
    return found


def on_record(ranks: Ranks, folder: Path) -> bytes:
    return of_rank0(ranks, (folder / "decisions.jsonl").read_bytes)


def assert_same(ranks: Ranks, mine: Trainer, other: Trainer) -> None:
    """Weights, decisions and the record of them."""
    assert mine.state.growth.decisions == other.state.growth.decisions
    assert digest(mine) == digest(other)
    assert mine.state.samples == other.state.samples == mine.plan.schedule.end_samples
    assert on_record(ranks, mine.folder) == on_record(ranks, other.folder)


Undisturbed = Callable[[dict[str, Any]], tuple[Trainer, Recorder]]


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The run of a trigger's job that nothing has happened to, trained once."""
    found: dict[str, tuple[Trainer, Recorder]] = {}

    def run(trigger: dict[str, Any]) -> tuple[Trainer, Recorder]:
        name = name_of(trigger)
        if name not in found:
            recorder = Recorder()
            folder = tmp_path_factory.mktemp(name)
            found[name] = train(job_of(trigger), ranks, folder, recorder, ConsumedFile()), recorder
        return found[name]

    return run


# --- what a run decides -----------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", TRIGGERS, ids=name_of)
def test_a_run_decides_records_it_and_its_plan_has_all_phases(
    ranks: Ranks, undisturbed: Undisturbed, trigger: dict[str, Any]
) -> None:
    trainer, recorder = undisturbed(trigger)
    decisions = trainer.state.growth.decisions
    assert [d.new_batch for d in decisions[:3]] == [32, 64, 96]
    assert [p.start_samples for p in trainer.plan.schedule.phases] == [0, *(d.samples for d in decisions)]
    if ranks.rank == 0:
        assert read_decisions(trainer.folder / "decisions.jsonl") == (None, decisions)
        assert tuple(recorder.decided) == decisions
        assert read_plan(trainer.folder)["phases"] == trainer.plan.to_dict()["phases"]
        phases = trainer.plan.schedule.phases
        ran = [(p.start_samples + (k + 1) * p.global_batch, p.lr) for p in phases for k in range(p.num_updates)]
        assert [(r.samples, r.lr) for r in recorder.records] == ran
        assert {r.samples: r.accumulation * r.ranks * 8 for r in recorder.records} == {
            r.samples: r.global_batch for r in recorder.records
        }
        if trigger is NOISE:
            assert decisions[0].measured["b_simple"] > 0.16
            assert all("all" in r.gradient_noise for r in recorder.records)
    restored = {d.restore_samples for d in decisions}
    assert restored == ({80} if trigger is BEST else {None})  # the first evaluation is the best


def test_going_back_to_the_best_weights_changes_the_run(undisturbed: Undisturbed) -> None:
    assert digest(undisturbed(PLATEAU)[0]) != digest(undisturbed(BEST)[0])


def test_a_decision_goes_back_to_the_weights_of_the_best_evaluation_and_to_their_average(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, str] = {}
    save = Trainer._save_if_due

    def record(self: Trainer, before: int, *, must_save: bool) -> None:
        assert self.state.average is not None
        states = {"model": self.parts.model.state_dict(), "average": self.state.average.state_dict()}
        seen[self.state.samples] = tree_digest(states)
        save(self, before, must_save=must_save)

    monkeypatch.setattr(Trainer, "_save_if_due", record)
    job = job_of(BEST, update={"ema_samples": 300.0})
    trainer = train(job, ranks, tmp_path / "whole")
    assert {seen[d.samples] for d in trainer.state.growth.decisions} == {seen[80]}
    # After the best evaluation and before the first decision: the checkpoint has both.
    whole, updates = dict(seen), 6
    train(job, ranks, tmp_path / "parts", stop=StopAfter(updates, here=True))
    train(job, ranks, tmp_path / "parts", checkpoint=newest(ranks, tmp_path / "parts"))
    assert 80 < 16 * updates < trainer.state.growth.decisions[0].samples
    assert seen == whole


def test_each_sample_once_an_epoch_across_decisions(ranks: Ranks, undisturbed: Undisturbed) -> None:
    trainer, _ = undisturbed(NOISE)
    assert len(trainer.state.growth.decisions) == 3
    if ranks.rank == 0:
        consumed = read_consumed(trainer.folder)
        assert consumed.bounds[-1] == trainer.state.samples
        assert audit(consumed, lambda *_: None).passed


def test_a_window_is_kept_also_where_nothing_else_is_due(ranks: Ranks, tmp_path: Path) -> None:
    trigger = {**PLATEAU, "windows_epochs": [[0.3, 0.45], [1.01, 1.1]]}
    trainer = train(job_of(trigger, evaluation={"every_epochs": 1.0}), ranks, tmp_path)
    # The first update that reaches 135 samples, and the first of 32 after that that reaches 330.
    assert [d.samples for d in trainer.state.growth.decisions] == [144, 336]
    assert [d.new_batch for d in trainer.state.growth.decisions] == [32, 64]


def test_a_window_ends_at_the_update_that_reaches_its_end() -> None:
    job = job_of({**PLATEAU, "windows_epochs": [[2.0, 4.0]]})
    growing = growth_controller.GrowthController(job, 1000, make_model())
    assert [growing.is_due(s - 16, s) for s in (3984, 4000, 4016)] == [False, True, False]


def test_the_loss_of_a_trigger_is_per_unit_of_weight() -> None:
    """16 samples of 8 tokens each, with a loss of 2 per token: 256/128."""
    job = job_of(NOISE)
    growing = growth_controller.GrowthController(job, NUM_TRAIN, make_model())
    growing.add(UpdateResult(256.0, 128.0, {}, False, 0, (), False, 1.0, {}), 16)
    assert growing._now(compile_plan(job, 1, NUM_TRAIN), 16, {}).loss == pytest.approx(2.0)


def test_the_end_of_a_window_decides_where_the_request_comes_to_nothing(tmp_path: Path) -> None:
    # 1.3 times the batch is rounded to the batch itself.
    trigger = {**NOISE, "ratio": 0.001, "max_batch_factor": 2.0, "windows_epochs": [[0.0, 0.5]]}
    job = job_of(trigger, schedule={"global_batch": 48, "max_batch": 96})
    growing = growth_controller.GrowthController(job, NUM_TRAIN, make_model())
    now = Measurement(144, 48, 0.05, 100.0, 1.0)
    request = BatchRequest("planted", batch=1.3 * 48)
    assert growing._decide(request, now, tmp_path) is None
    late = replace(now, samples=192)
    (tmp_path / "decisions.jsonl").touch()
    decided = growing._decide(request, late, tmp_path)
    assert decided is not None
    assert decided["new_batch"] == 96


def test_adascale_counts_progress_by_its_gain(ranks: Ranks, undisturbed: Undisturbed) -> None:
    trainer, recorder = undisturbed(ADASCALE)
    start, decisions, schedule = 0.05, trainer.state.growth.decisions, trainer.plan.schedule
    assert len(decisions) >= 2
    assert {decision.new_batch for decision in decisions} == {32}
    gains = [decision.new_lr / start for decision in decisions]
    phi = [decision.measured["b_simple"] for decision in decisions]
    assert gains == pytest.approx([2 * (p + 16) / (p + 32) for p in phi])
    # Progress, step by step: an update is worth as many samples of the base batch as its gain says.
    progress, at, gain, passed = 0.0, 0, 1.0, False
    while progress < 3 * NUM_TRAIN - 1e-6:
        gain = next((g for d, g in zip(decisions, gains, strict=True) if d.samples == at), gain)
        passed = passed or progress >= NUM_TRAIN - 1e-6
        assert schedule.at(at).lr == pytest.approx(start * gain / (10 if passed else 1))
        assert schedule.progress_at(at) == pytest.approx(progress)
        progress, at = progress + 16 * gain, at + 32
    assert trainer.state.samples == at == schedule.end_samples
    if ranks.rank == 0:
        assert recorder.records[-1].progress_epochs == pytest.approx(progress / NUM_TRAIN)
        kept = {path.stem for path in (trainer.folder / "checkpoints").glob("*.pt")}
        assert not {f"samples-{decision.samples:015d}" for decision in decisions[:2]} & kept  # a gain ends no phase


# --- ranks agree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", [*TRIGGERS, ADASCALE], ids=name_of)
def test_what_rank_0_decides_holds_whatever_the_others_measure(
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Undisturbed,
    trigger: dict[str, Any],
) -> None:
    # (k): losses, gradients and evaluations differ on every rank but the first
    whole, _ = undisturbed(trigger)
    update = UpdateEngine.update

    def update_otherwise(self: UpdateEngine, *args: Any, **kwargs: Any) -> UpdateResult:
        result = update(self, *args, **kwargs)
        if ranks.rank == 0:
            return result
        noise = {name: NoiseEstimate(seen.trace, -1.0) for name, seen in result.noise.items()}
        return replace(result, noise=noise, loss_sum=7.0 * result.loss_sum)

    def evaluate_otherwise(
        parts: TrainingParts, state: TrainState, team: Ranks, dataset: EvaluatedSet, **kwargs: Any
    ) -> Evaluation:
        result = evaluate(parts, state, team, dataset, **kwargs)
        return result if ranks.rank == 0 else replace(result, loss=-10.0 * state.samples)  # ever better

    monkeypatch.setattr(UpdateEngine, "update", update_otherwise)
    monkeypatch.setattr(trainer_module, "evaluate", evaluate_otherwise)
    assert_same(ranks, train(job_of(trigger), ranks, tmp_path / "otherwise"), whole)
    mine = digest(whole).encode()
    assert ranks.broadcast_bytes(mine, "test.digest") == mine


@pytest.mark.parametrize("trigger", [*TRIGGERS, ADASCALE], ids=name_of)
def test_in_exact_mode_all_layouts_measure_and_decide_the_same_to_the_bit(
    ranks: Ranks, tmp_path: Path, trigger: dict[str, Any]
) -> None:
    job = job_of(trigger, layout={"exact": True, "uneven_ranks": True, "max_micro_batch": 8})
    together = train(job, ranks, tmp_path / "together")
    alone = train(job, SingleRank(), tmp_path / "alone")
    assert together.state.growth.decisions == alone.state.growth.decisions
    assert together.state.growth.noise == alone.state.growth.noise
    assert together.state.growth.state()["loss"] == alone.state.growth.state()["loss"]
    assert digest(together) == digest(alone)


@pytest.mark.parametrize("trigger", [PLATEAU, BEST], ids=name_of)
def test_growth_by_ranks_decides_like_growth_by_passes(ranks: Ranks, tmp_path: Path, trigger: dict[str, Any]) -> None:
    """A batch of one ghost batch is one rank's; the phases after it have all of them."""
    schedule = {"global_batch": 8, "max_batch": 96}
    exact = {"exact": True, "max_micro_batch": 8, "uneven_ranks": True}
    by_ranks = train(
        job_of(trigger, schedule=schedule, layout={**exact, "grow_by": "ranks"}), ranks, tmp_path / "ranks"
    )
    by_passes = train(job_of(trigger, schedule=schedule, layout=exact), SingleRank(), tmp_path / "passes")
    used = [layout.ranks for layout in by_ranks.plan.layouts]
    assert used[:2] == [1, ranks.size]
    assert by_ranks.state.growth.decisions == by_passes.state.growth.decisions
    assert digest(by_ranks) == digest(by_passes)


def test_a_trigger_that_measures_continues_where_ranks_join(ranks: Ranks, tmp_path: Path) -> None:
    # 24 = 3 passes of 8 on one rank; 48 is a full pass for each of several
    schedule = {"global_batch": 24, "max_batch": 96}
    job = job_of(NOISE, schedule=schedule, layout={"grow_by": "ranks", "max_micro_batch": 16})
    trainer = train(job, ranks, tmp_path)
    assert [d.new_batch for d in trainer.state.growth.decisions] == [48, 96]
    assert [layout.ranks for layout in trainer.plan.layouts] == [1, *[min(ranks.size, n) for n in (3, 6)]]
    mine = json.dumps(trainer.state.growth.state(), default=str, sort_keys=True).encode()
    assert ranks.broadcast_bytes(mine, "test.state") == mine


# --- interruptions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", [*TRIGGERS, ADASCALE], ids=name_of)
@pytest.mark.parametrize("updates", [8, 16])
def test_a_measured_run_stopped_after_any_update_ends_as_if_it_had_not_been(
    ranks: Ranks, tmp_path: Path, undisturbed: Undisturbed, trigger: dict[str, Any], updates: int
) -> None:
    # (b): batch and accumulation come back after a decision
    job, second = job_of(trigger), Recorder()
    whole, first = undisturbed(trigger)
    stop = StopAfter(updates, here=ranks.rank == ranks.size - 1)
    stopped = train(job, ranks, tmp_path / "parts", stop=stop)
    assert stopped.state.samples < whole.state.samples
    checkpoint = newest(ranks, tmp_path / "parts")
    assert checkpoint.samples == stopped.state.samples
    resumed = train(job, ranks, tmp_path / "parts", second, checkpoint=checkpoint)
    assert_same(ranks, resumed, whole)
    assert in_numbers(second) == in_numbers(first)[updates:]
    assert resumed.state.growth.noise == whole.state.growth.noise


@pytest.mark.parametrize(("trigger", "decision"), [(NOISE, 0), (NOISE, 2), (PLATEAU, 1), (BEST, 2)], ids=name_of)
def test_a_kill_between_a_decision_and_its_effect_changes_nothing(
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Undisturbed,
    trigger: dict[str, Any],
    decision: int,
) -> None:
    job = job_of(trigger)
    whole, _ = undisturbed(trigger)

    def write_and_die(folder: Path, source: str | None, decisions: Sequence[Decision]) -> None:
        write_decisions(folder, source, decisions)
        if len(decisions) == decision + 1:
            raise RunError("killed")

    monkeypatch.setattr(growth_controller, "write_decisions", write_and_die)
    with pytest.raises(CollectiveError):
        train(job, ranks, tmp_path / "parts")
    monkeypatch.setattr(growth_controller, "write_decisions", write_decisions)
    path = tmp_path / "parts" / "decisions.jsonl"
    # Before the first checkpoint of the first case, which starts from scratch.
    checkpoint = training.newest(ranks, tmp_path / "parts")
    made = [d for d in whole.state.growth.decisions if checkpoint and d.samples <= checkpoint.samples]
    assert len(made) == decision  # the last is on the record alone
    if ranks.rank == 0:
        # What the record says is followed, not decided once more.
        *head, line = path.read_text().splitlines()
        last = json.loads(line) | {"why": "as recorded"}
        path.write_text("".join(line + "\n" for line in [*head, json.dumps(last)]))
    resumed = train(job, ranks, tmp_path / "parts", checkpoint=checkpoint)
    assert resumed.state.growth.decisions[decision].why == "as recorded"
    assert [replace(d, why="") for d in resumed.state.growth.decisions] == [
        replace(d, why="") for d in whole.state.growth.decisions
    ]
    assert digest(resumed) == digest(whole)
    assert on_record(ranks, tmp_path / "parts").count(b"\n") == len(whole.state.growth.decisions)


@pytest.mark.parametrize("damage", ["gone", "nonsense", "torn", "another"])
def test_a_lost_record_is_rebuilt_from_the_checkpoint(
    ranks: Ranks, tmp_path: Path, undisturbed: Undisturbed, damage: str
) -> None:
    job = job_of(NOISE)
    whole, _ = undisturbed(NOISE)
    train(job, ranks, tmp_path / "parts", stop=StopAfter(12, here=True))
    checkpoint, path = newest(ranks, tmp_path / "parts"), tmp_path / "parts" / "decisions.jsonl"
    made = [d for d in whole.state.growth.decisions if d.samples <= checkpoint.samples]
    assert 0 < len(made) < len(whole.state.growth.decisions)
    if ranks.rank == 0:
        text = path.read_text()
        if damage == "gone":
            path.unlink()
        else:
            other = decisions_text(None, [replace(made[0], new_batch=80)]).decode()
            path.write_text({"nonsense": "nonsense\n", "torn": text + '{"samples": 4', "another": other}[damage])
    recorder = Recorder()
    resumed = train(job, ranks, tmp_path / "parts", recorder, checkpoint=checkpoint)
    assert_same(ranks, resumed, whole)
    report = {
        "gone": f"is missing; using the {len(made)} decisions of the checkpoint",
        "nonsense": "line 1: is not a decision",
        "another": "does not match the checkpoint; using the",
    }
    if ranks.rank == 0:
        assert report.get(damage, "") in "\n".join(recorder.notes)
        assert bool(recorder.notes) == (damage != "torn")  # no rank has used the torn line


def test_checkpoints_of_all_decisions_are_kept_across_a_resume(ranks: Ranks, tmp_path: Path) -> None:
    job = job_of(NOISE, checkpoint={"every_epochs": 0.2, "keep": 1})
    train(job, ranks, tmp_path, stop=StopAfter(18, here=True))
    resumed = train(job, ranks, tmp_path, checkpoint=newest(ranks, tmp_path))
    decisions = [d.samples for d in resumed.state.growth.decisions]
    if ranks.rank == 0:
        kept = [Checkpoint.from_bytes(path.read_bytes()) for path in (tmp_path / "checkpoints").glob("*.pt")]
        assert {c.samples for c in kept} >= {*decisions, resumed.state.samples}
        assert len(kept) <= len(decisions) + 2


# --- replay and fork --------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", [*TRIGGERS, ADASCALE], ids=name_of)
def test_a_replay_gives_the_same_weights_without_measuring(
    ranks: Ranks, tmp_path: Path, undisturbed: Undisturbed, trigger: dict[str, Any]
) -> None:
    whole, _ = undisturbed(trigger)
    path = whole.folder / "decisions.jsonl"
    replayed = train(job_of(trigger), ranks, tmp_path / "replayed", replay=path)
    assert digest(replayed) == digest(whole)
    assert replayed.state.growth.decisions == whole.state.growth.decisions
    assert replayed.parts.engine.buckets.norms is None
    assert replayed.state.growth.noise == {}
    if ranks.rank == 0:
        assert read_decisions(tmp_path / "replayed" / "decisions.jsonl") == (str(path), whole.state.growth.decisions)


@pytest.mark.parametrize(("trigger", "updates"), [(NOISE, 14), (BEST, 7)], ids=name_of)
def test_a_resumed_replay_is_still_a_replay(
    ranks: Ranks, tmp_path: Path, undisturbed: Undisturbed, trigger: dict[str, Any], updates: int
) -> None:
    whole, _ = undisturbed(trigger)
    path = whole.folder / "decisions.jsonl"
    train(job_of(trigger), ranks, tmp_path / "again", stop=StopAfter(updates, here=True), replay=path)
    resumed = train(job_of(trigger), ranks, tmp_path / "again", checkpoint=newest(ranks, tmp_path / "again"))
    assert digest(resumed) == digest(whole)
    assert resumed.state.growth.replayed_from == of_rank0(ranks, lambda: str(path).encode()).decode()
    assert resumed.parts.engine.buckets.norms is None


def test_fewer_decisions_replayed_are_all_that_there_are(
    ranks: Ranks, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    whole, _ = undisturbed(NOISE)
    (tmp_path / "one.jsonl").write_bytes(decisions_text(None, whole.state.growth.decisions[:1]))
    replayed = train(job_of(NOISE), ranks, tmp_path / "one", replay=tmp_path / "one.jsonl")
    assert replayed.state.growth.decisions == whole.state.growth.decisions[:1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 152}, "one.jsonl: 1 fault\n  decision 1: at sample 152, 9.50 updates of 16"),
        ({"new_batch": 36}, "one.jsonl: 1 fault\n  .*36 = 4.50 ghost batches of 8"),
    ],
)
def test_decisions_that_do_not_fit_are_refused_and_the_record_stays(
    ranks: Ranks, tmp_path: Path, undisturbed: Undisturbed, changes: dict[str, Any], message: str
) -> None:
    job = job_of(NOISE)
    whole, _ = undisturbed(NOISE)
    before = on_record(ranks, whole.folder)
    (tmp_path / "one.jsonl").write_bytes(decisions_text(None, [replace(whole.state.growth.decisions[0], **changes)]))
    train(job, ranks, tmp_path / "parts", stop=StopAfter(3, here=True))
    for checkpoint, folder in ((None, tmp_path / "new"), (newest(ranks, tmp_path / "parts"), whole.folder)):
        with pytest.raises(CollectiveError) as failure:
            train(job, ranks, folder, checkpoint=checkpoint, replay=tmp_path / "one.jsonl")
        if ranks.rank == 0:
            with pytest.raises(Exception, match=message):
                raise failure.value.error  # type: ignore[misc]
            assert not (tmp_path / "new" / "decisions.jsonl").exists()
    assert on_record(ranks, whole.folder) == before


def test_a_run_cannot_resume_with_other_decisions_than_its_own(ranks: Ranks, tmp_path: Path) -> None:
    job = job_of(NOISE)
    stopped = train(job, ranks, tmp_path / "parts", stop=StopAfter(18, here=True))
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(CollectiveError) as failure:
        train(
            job,
            ranks,
            tmp_path / "parts",
            checkpoint=newest(ranks, tmp_path / "parts"),
            replay=tmp_path / "none.jsonl",
        )
    if ranks.rank == 0:
        count = len(stopped.state.growth.decisions)
        assert f"does not begin with the {count} decisions that led to the checkpoint" in str(failure.value.error)


@pytest.mark.parametrize("changes", [{}, {"ratio": 1e9}], ids=["the same job", "another trigger"])
def test_a_fork_continues_from_the_decisions_that_were_made(
    ranks: Ranks, tmp_path: Path, changes: dict[str, Any]
) -> None:
    # 24 and then 48, 88 samples an update: where it stands, no run of 24 alone ever is
    sections: dict[str, Any] = {"schedule": {"global_batch": 24, "batch_multiple": 8, "max_batch": 88}}
    sections["layout"] = {"max_micro_batch": 8, "uneven_ranks": True}
    job = job_of(NOISE, **sections)
    whole = train(job, ranks, tmp_path / "whole")
    assert [d.new_batch for d in whole.state.growth.decisions] == [48, 88]
    updates = whole.plan.schedule.updates_at(whole.state.growth.decisions[-1].samples) + 2
    origin = train(job, ranks, tmp_path / "origin", stop=StopAfter(updates, here=True))
    assert origin.state.samples % 24
    forked = job_of({**NOISE, **changes}, **sections)
    plan = compile_plan(forked, ranks.size, NUM_TRAIN)
    checkpoint, notes = open_run(
        tmp_path / "fork",
        forked,
        plan,
        ranks,
        hardware_of(ranks, torch.device("cpu")),
        resume=False,
        overwrite=False,
        origin=Origin(tmp_path / "origin"),
    )
    recorder = Recorder()
    trainer = train(forked, ranks, tmp_path / "fork", recorder, checkpoint=checkpoint)
    assert not any("decisions" in note for note in [*notes, *recorder.notes])
    assert_same(ranks, trainer, whole)
