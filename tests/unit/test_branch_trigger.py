"""The trigger `branch`: when it trains branches, what they cost, what it decides by them, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import LrRule
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.results.branching import BranchRecord, compare_branches
from hvd_batchgrow.schedule.adaptive.batch_requests import form_decision
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.branches import branch_job, branch_point
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.trigger import Measurement, check_rule_state, make_trigger
from hvd_batchgrow.schedule.triggers.branch import BranchRule, branch_lr_rule
from hvd_batchgrow.train.branch_rounds import evidence
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.train.run.plan_for_ranks import plan_for_ranks
from hvd_batchgrow.train.trainer import Trainer
from tests.helpers import NUM_TRAIN, measured_job

TRIGGER: dict[str, Any] = {"name": "branch", "factors": [1, 2], "branch_samples": 512}
"""Blocks of 32 samples at the first batch of 16, so 512 is the fewest, and a round takes 1,024 samples."""
EPOCHS = 120.0
"""36,000 samples, of which branches may use 3,600."""


def job_of(trigger: dict[str, Any] = TRIGGER, **sections: Any) -> Job:
    sections["schedule"] = {"epochs": EPOCHS} | sections.get("schedule", {})
    return measured_job(trigger, **sections)


def rule_of(job: Job) -> BranchRule:
    rule = make_trigger(job, NUM_TRAIN)
    assert isinstance(rule, BranchRule)
    return rule


def faults(job: Job, ranks: int = 1) -> str:
    with pytest.raises(JobError) as found:
        compile_plan(job, ranks, NUM_TRAIN)
    return str(found.value)


# --- when branches are trained, and what they cost ----------------------------------------------------


def rounds(rule: BranchRule, batches: dict[int, int], *, through_checkpoints: bool = False, job: Job) -> list[int]:
    """Return the sample counters of the rounds of a run, whose batch from some sample counters on is given."""
    found, samples, end = [], 0, round(job.schedule.epochs * NUM_TRAIN)
    while samples < end:
        batch = next(batch for start, batch in reversed(batches.items()) if samples >= start)
        before, samples = samples, samples + batch
        if through_checkpoints:
            again = rule_of(job)
            again.load(rule.state.model_dump())
            rule = again
        if rule.plan_round(before, samples, batch):
            assert rule.state.round_at == samples
            found.append(samples)
            rule.end_round(batch)
    return found


@pytest.mark.parametrize("through_checkpoints", [False, True])
def test_a_round_is_due_each_period_until_the_budget_is_used(through_checkpoints: bool) -> None:
    job = job_of({**TRIGGER, "every_epochs": 10.0})
    found = rounds(rule_of(job), {0: 16}, through_checkpoints=through_checkpoints, job=job)
    # 3 rounds of 1,024 fit 3,600; after each multiple of 3,000 samples, at the first whole update of 16
    assert found == [3008, 6000, 9008]


def test_a_larger_batch_needs_more_samples_and_the_first_round_that_does_not_fit_is_noted() -> None:
    job = job_of({**TRIGGER, "every_epochs": 10.0})
    rule = rule_of(job)
    # At 32 a block has 64 samples, and 2 branches of 16 blocks take 2,048: 1,024 + 2,048 leave 528.
    assert rounds(rule, {0: 16, 3008: 32}, job=job) == [3008, 6016]
    assert rule.state.spent_samples == 1024 + 2048
    assert rule.state.over_budget_at == 9024
    assert "no branches: 528 of 3,600 samples of the budget are left" in rule.over_budget(32)
    assert "2 branches of 1,024 samples at the batch 32 take 2,048" in rule.over_budget(32)
    assert rule.over_budget(32).endswith("; the batch stays 32 for the rest of the run")
    # At 64, twice the batch is above max_batch = 96, so there is nothing to find out.
    assert rule.request(64) is None
    assert not rule.plan_round(11_990, 12_000, 64)


@pytest.mark.parametrize(
    ("trigger", "schedule", "fits"),
    [
        ({}, {}, True),
        ({}, {"max_batch": 24}, False),
        ({}, {"epochs": 36.0}, True),  # 512 of 10,800 samples are left at sample 10,288
        ({}, {"epochs": 35.9}, False),
        ({"budget": 0.05}, {}, False),  # 1,800 samples, of which 1,024 are spent
    ],
)
def test_a_fork_may_not_allow_the_round_that_is_due(
    trigger: dict[str, Any], schedule: dict[str, Any], fits: bool
) -> None:
    rule = rule_of(job_of({**TRIGGER, **trigger}, schedule=schedule))
    spent = 0 if "epochs" in schedule else 1024
    rule.load({"round_at": 10_288, "spent_samples": spent})
    assert rule.fits(10_288, 16) == fits
    if fits:
        return
    growth = SimpleNamespace(branch_rule=rule, is_decided=lambda _: False)
    phases = SimpleNamespace(at=lambda _: SimpleNamespace(global_batch=16))
    state = SimpleNamespace(samples=10_288, growth=growth)
    trainer: Any = SimpleNamespace(state=state, plan=SimpleNamespace(schedule=phases), rounds=None)
    assert not Trainer._train_branches(trainer, StopRequest())
    assert rule.state.model_dump() == {"round_at": None, "spent_samples": spent, "over_budget_at": None}


def test_factors_above_the_limit_are_not_trained() -> None:
    rule = rule_of(job_of({**TRIGGER, "factors": [4, 1, 2]}))
    for batch, factors, block in ((16, (1, 2, 4), 64), (32, (1, 2), 64), (48, (1, 2), 96)):
        wanted = rule.request(batch)
        assert wanted is not None
        assert (wanted.factors, wanted.block) == (factors, block)
        assert wanted.num_samples == max(16, -(-512 // block)) * block
    default = rule_of(job_of({"name": "branch", "factors": [1, 2]})).request(16)
    assert default is not None
    assert default.num_samples == 32 * 32


@pytest.mark.parametrize(
    ("trigger", "schedule", "first"),
    [
        ({}, {}, 304),
        ({"every_epochs": 2.0}, {}, 608),
        ({"first_decision_epoch": 2.5}, {}, 912),
        ({}, {"warmup_epochs": 3.0}, 912),
        ({"first_decision_epoch": 0.0}, {"warmup_epochs": 3.0}, 304),
    ],
)
def test_the_first_round_is_at_a_period_after_the_first_decision_epoch_or_the_warm_up(
    trigger: dict[str, Any], schedule: dict[str, Any], first: int
) -> None:
    job = job_of({**TRIGGER, **trigger}, schedule=schedule)
    assert rounds(rule_of(job), {0: 16}, job=job)[0] == first


def test_a_round_is_due_at_the_sample_at_which_the_warm_up_ends() -> None:
    rule = make_trigger(job_of(schedule={"warmup_epochs": 1.0}), 320)
    assert isinstance(rule, BranchRule)
    assert rule.plan_round(304, 320, 16)


def test_no_round_is_longer_than_the_rest_of_the_run() -> None:
    job = job_of({**TRIGGER, "first_decision_epoch": 118.0})
    # From epoch 118, 35,408 samples, 512 are left; from epoch 119 only 288.
    assert rounds(rule_of(job), {0: 16}, job=job) == [35_408]


def test_the_plan_says_what_a_round_costs() -> None:
    (cost, noise) = compile_plan(job_of(), 1, NUM_TRAIN).notes
    assert "2 branches of 512 samples take 32 + 16 updates per round" in cost
    assert "0.1 = 3,600 samples allows 3 rounds" in cost
    assert "schedule.lr_rule = 'none'" in noise
    assert len(compile_plan(job_of(schedule={"lr_rule": "linear"}), 1, NUM_TRAIN).notes) == 1


# --- what is decided ------------------------------------------------------------------------------------


def record(factor: int, losses: list[float]) -> BranchRecord:
    values = np.repeat(losses, 4 // factor)
    return BranchRecord(Path("b"), factor, 16 * factor, 0.1, 1, values, 0.1, float("nan"), "test")


def decide(job: Job, offsets: dict[int, float | None], tolerance: float | None = None) -> Decision | None:
    """Return the decision at sample 304 if the loss of branch k is offset from that of k = 1; None: not finite."""
    noise = np.random.default_rng(3).normal(0, 0.01, 64)
    base = (1.0 + np.random.default_rng(1).normal(0, 1, 64)).tolist()
    records = [record(1, base)]
    for factor, offset in offsets.items():
        losses = [np.nan] * 64 if offset is None else [a + offset + b for a, b in zip(base, noise, strict=True)]
        records.append(record(factor, losses))
    found = compare_branches(records, 64, tolerance)
    now = Measurement(304, 16, 0.05, branches=evidence(found, 4096), branches_text=found.verdict())
    request = rule_of(job).look(now)
    return form_decision(job, NUM_TRAIN, (), 304, request, now.numbers()) if request else None


@pytest.mark.parametrize(
    ("offsets", "tolerance", "batch"),
    [
        ({2: 0.0, 4: 0.0}, None, 64),
        ({2: 0.0, 4: 1.0}, None, 32),
        ({2: 1.0, 4: 0.0}, None, None),  # a larger batch counts only together with all smaller ones
        ({2: 0.0, 4: None}, None, 32),
        ({2: None, 4: 0.0}, None, None),
        ({2: 0.05, 4: 0.2}, 0.1, 32),
        ({2: 0.05, 4: 0.2}, 0.01, None),
    ],
)
def test_the_batch_grows_to_the_largest_that_is_not_worse(
    offsets: dict[int, float | None], tolerance: float | None, batch: int | None
) -> None:
    job = job_of({**TRIGGER, "factors": [1, 2, 4]}, schedule={"lr_rule": "linear", "batch_multiple": 16})
    decision = decide(job, offsets, tolerance)
    assert (decision and decision.new_batch) == batch
    if decision is None:
        return
    assert (decision.old_lr, decision.new_lr) == (0.05, 0.05)  # before lr_rule
    for factor, offset in offsets.items():
        assert (f"k{factor}_difference" in decision.measured) == (offset is not None)
        assert decision.measured[f"k{factor}_is_not_worse"] == (16 * factor <= decision.new_batch)
        if offset is not None:
            assert decision.measured[f"k{factor}_difference"] == pytest.approx(offset, abs=0.01)
    assert decision.why.startswith("critical batch: ")


def test_without_branches_nothing_is_requested() -> None:
    assert rule_of(job_of()).look(Measurement(304, 16, 0.05, metric=0.1, loss=1.0)) is None


ADAM = {"name": "adamw", "lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}
SGD = {"weight_decay_rule": "per_epoch"}


@pytest.mark.parametrize(
    ("optim", "rule"),
    [(SGD, "none"), (SGD, "linear"), (SGD, "sqrt"), (ADAM, "none"), (ADAM, "linear"), (ADAM, "adam")],
)
def test_a_branch_is_trained_as_the_run_continues_after_the_growth(optim: dict[str, Any], rule: LrRule) -> None:
    """Learning rate, momentum, Adam's averages and weight decay of a branch are those of the run's next phase."""
    job = job_of(optim=optim, schedule={"lr_rule": rule, "lr_boundaries_epochs": [0.5], "global_batch": 8})
    grown = Decision(80, "branch", "", 8, 16, 16.0, job.optim.lr, job.optim.lr)
    decision = Decision(304, "branch", "", 16, 32, 32.0, job.optim.lr, job.optim.lr)
    after = compile_plan(job, 1, NUM_TRAIN, None, (grown, decision)).schedule.at(304)
    point = branch_point(job, (grown,), NUM_TRAIN, 304)
    wanted = rule_of(job).request(16)
    assert wanted is not None
    own: Any = branch_job(point, wanted, 2, 1).optim
    decay = 1.0 if after.weight_decay_factor is None else after.weight_decay_factor
    assert own.lr == pytest.approx(after.lr)
    assert own.momentum == pytest.approx(after.momentum)
    assert own.weight_decay == pytest.approx(job.optim.weight_decay * decay)
    if optim is ADAM:
        assert own.betas[1] == pytest.approx(0.99 if after.beta2 is None else after.beta2)
        assert own.eps == pytest.approx(1e-6 if after.eps is None else after.eps)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "rule"), [(ADAM, "sqrt"), (ADAM, "adam_linear")], ids=["sqrt with Adam", "adam_linear"]
)
def test_a_learning_rate_rule_that_no_branch_has_is_refused(optim: dict[str, Any], rule: LrRule) -> None:
    job = job_of(optim=optim, schedule={"lr_rule": rule, "max_batch": 32})
    assert branch_lr_rule(job) is None
    assert f"schedule.lr_rule: '{rule}' is not possible with the trigger 'branch'" in faults(job)


@pytest.mark.parametrize(
    ("trigger", "sections", "message"),
    [
        ({"factors": [2, 4]}, {}, r"trigger.factors: must be distinct whole numbers >= 1, including 1"),
        ({"factors": [1]}, {}, r"trigger.factors: must be distinct whole numbers >= 1, including 1"),
        ({"factors": [1, 8]}, {}, "smallest growth, 8 × 16, is above the limit of 96 (schedule.max_batch): the batch"),
        ({"branch_samples": 480}, {}, "trigger.branch_samples: 480 make 15 blocks of 32 samples, too few"),
        ({"first_decision_epoch": 120.0}, {}, "trigger.first_decision_epoch: 120: the first round is at epoch 120"),
        ({"first_decision_epoch": 120.0}, {}, "on 512 samples, but only 0 are left; use <= 118"),
        ({}, {"schedule": {"warmup_epochs": 119.0}}, "schedule.warmup_epochs: 119: the first round is at epoch 119"),
        ({"every_epochs": 119.0}, {}, "trigger.every_epochs: 119: the first round is at epoch 119, and its branches"),
        (
            {},
            {"optim": {"weight_decay_rule": "per_epoch", "groups": [{"match": "*", "weight_decay": 0.1}]}},
            "'per_epoch' with a weight decay in optim.groups is not possible in branches",
        ),
    ],
)
def test_keys_that_cannot_work_are_refused(trigger: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    assert message in faults(job_of({**TRIGGER, **trigger}, **sections))


def test_the_first_round_of_a_job_without_faults_is_within_the_run() -> None:
    """Of 36,003 samples, 512 are left after sample 35,490, but not after 35,504, the first whole update of 16."""
    schedule = {"epochs": 120.01}
    message = faults(job_of({**TRIGGER, "every_epochs": 118.3}, schedule=schedule))
    assert "trigger.every_epochs: 118.3: " in message
    assert "but only 499 are left; use <= 118.293" in message
    remedied = job_of({**TRIGGER, "every_epochs": 118.293}, schedule=schedule)
    assert compile_plan(remedied, 1, NUM_TRAIN).notes
    assert rounds(rule_of(remedied), {0: 16}, job=remedied) == [35_488]


def test_with_sgd_no_rule_of_adam_is_suggested() -> None:
    message = faults(job_of(schedule={"lr_rule": "adam_linear"}))
    assert "lr_rule" in message
    assert "for 'sgd' use 'adam'" not in message


@pytest.mark.parametrize("budget", [0.0, 0.101])
def test_the_budget_is_above_0_and_at_most_a_tenth(budget: float) -> None:
    with pytest.raises(JobError, match=r"trigger\.budget"):
        job_of({**TRIGGER, "budget": budget})


@pytest.mark.parametrize(
    ("trigger", "epochs", "arithmetic", "changes"),
    [
        # 2 branches of 512 are 1,024 of 36,000 samples, a share of 0.0285
        (
            {"budget": 0.02},
            EPOCHS,
            "0.02 of the run's 36,000 samples are 720, and a round at the first batch, 16, takes 1,024: 2 branches",
            {"budget": 0.029},
        ),
        # 34 epochs are 10,200 samples, a tenth of which is below 1,024; 10,240 are 34.134 epochs
        ({}, 34.0, "0.1 of the run's 10,200 samples are 1,020", {"epochs": 34.134}),
        # 3 branches of 32 blocks of 64 take 6,144
        (
            {"factors": [1, 2, 4], "branch_samples": None},
            EPOCHS,
            "samples are 3,600, and a round at the first batch, 16, takes 6,144: 3 branches of 2,048",
            {"branch_samples": 1152},
        ),
        (
            {"factors": [1, 2, 4], "branch_samples": None},
            80.0,
            "samples are 2,400, and a round at the first batch, 16, takes 6,144",
            {"factors": [1, 2], "branch_samples": 512},
        ),
    ],
)
def test_a_budget_without_a_round_is_refused_with_values_that_work(
    trigger: dict[str, Any], epochs: float, arithmetic: str, changes: dict[str, Any]
) -> None:
    asked = {key: value for key, value in {**TRIGGER, **trigger}.items() if value is not None}
    message = faults(job_of(asked, schedule={"epochs": epochs}))
    assert "trigger.budget: " in message
    assert arithmetic in message
    assert str(next(iter(changes.values()))) in message
    changed = {key: value for key, value in changes.items() if key != "epochs"}
    remedied = job_of({**asked, **changed}, schedule={"epochs": changes.get("epochs", epochs)})
    assert compile_plan(remedied, 1, NUM_TRAIN).notes


def test_an_elastic_job_is_refused_unless_it_replays(tmp_path: Path) -> None:
    ranks = cast("Ranks", SimpleNamespace(elastic=True, size=1))
    with pytest.raises(
        JobError, match=r"'branch' does not run as an elastic job.*; launch it on fixed ranks, or with --replay"
    ):
        plan_for_ranks(job_of(), ranks)


def test_its_state_is_that_of_a_trigger() -> None:
    state = rule_of(job_of()).state.model_dump()
    assert check_rule_state(state) == state
