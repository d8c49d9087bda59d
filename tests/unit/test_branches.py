"""What branches of a run train: batch, learning rate, Adam's averages and weight decay from a checkpoint on."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.branches import (
    BranchLrRule,
    BranchPoint,
    branch_job,
    branch_point,
    branch_request,
    branches_folder,
    lr_text,
    parse_branches_folder,
    plan_branch,
)
from hvd_batchgrow.schedule.phases import Phase
from tests.helpers import NUM_TRAIN, measured_job, small_job

ADAM = {"name": "adamw", "lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}


def at(samples: int, job: Job | None = None, decisions: tuple[Decision, ...] = ()) -> BranchPoint:
    """Where `small_job` is: batches of 16 up to 160, of 48 up to 304, of 96 from there on."""
    return branch_point(job or small_job(), decisions, NUM_TRAIN, samples)


def branch(point: BranchPoint, factor: int, rule: BranchLrRule | None = None, ranks: int = 1) -> Job:
    return branch_job(point, branch_request(point, (1, factor), None, rule), factor, ranks)


def next_phase(point: BranchPoint, factor: int, rule: BranchLrRule | None = None) -> Phase:
    return plan_branch(point, branch_request(point, (1, factor), None, rule), factor, 1).schedule.at(point.samples)


def test_a_branch_begins_with_the_update_after_the_checkpoint() -> None:
    for samples, batch in ((160, 48), (208, 48), (304, 96), (48, 16)):
        point = at(samples)
        assert point.global_batch == batch
        wanted = branch_request(point, (1, 2, 3), None, None)
        for factor in (1, 2, 3):
            schedule = plan_branch(point, wanted, factor, 1).schedule
            phase = schedule.at(samples)
            assert (phase.start_samples, phase.global_batch) == (samples, factor * batch)
            assert phase.num_updates * factor * batch == wanted.num_samples
            assert schedule.end_samples == samples + wanted.num_samples
            before = [(old.start_samples, old.global_batch) for old in schedule.phases[:-1]]
            assert before == [(start, b) for start, b in ((0, 16), (160, 48), (304, 96)) if start < samples]


@pytest.mark.parametrize(("rule", "scale"), [("none", 1), ("sqrt", 2), ("linear", 4), (None, 4)])
def test_the_learning_rate_of_sgd_follows_the_rule(rule: BranchLrRule | None, scale: float) -> None:
    point = at(160)
    phase = next_phase(point, 4, rule)
    assert phase.lr == pytest.approx(0.05 * scale)
    assert phase.momentum == 0.9
    assert phase.weight_decay_factor is None
    assert branch(point, 4, rule).optim.weight_decay == 1e-3


def test_the_learning_rate_is_that_of_the_checkpoint_also_within_a_warm_up() -> None:
    job = small_job(schedule={"warmup_epochs": 1.0})
    assert next_phase(at(160, job), 2, "none").lr == pytest.approx(0.05 * 160 / NUM_TRAIN)
    decayed = at(496)  # beyond the largest batch the learning rate falls
    assert next_phase(decayed, 2, "linear").lr == pytest.approx(2 * decayed.phase.lr)
    assert decayed.phase.lr < 0.02


def test_adam_keeps_the_half_life_of_its_averages() -> None:
    point = at(160, small_job(optim=ADAM))
    for rule in (None, "sqrt"):
        optim: Any = branch(point, 4, rule).optim
        assert optim.lr == pytest.approx(0.01 * 2)
        assert optim.betas == pytest.approx((0.9**4, 0.99**4))
        assert optim.eps == pytest.approx(1e-6 / 2)
    unscaled: Any = branch(point, 4, "linear").optim
    assert (unscaled.lr, unscaled.betas, unscaled.eps) == (pytest.approx(0.04), (0.9, 0.99), 1e-6)
    assert "β₁ᵏ" in lr_text(point, "sqrt")
    assert "β" not in lr_text(at(160), "sqrt")


def test_adams_averages_in_the_phase_are_the_start_of_the_rule() -> None:
    job = small_job(optim=ADAM, schedule={"lr_rule": "adam"})
    first: Any = branch(at(160, job), 2, "none").optim
    assert first.lr == pytest.approx(0.01 * 3**0.5)
    assert first.betas == pytest.approx((0.9**3, 0.99**3))
    assert first.eps == pytest.approx(1e-6 / 3**0.5)
    second: Any = branch(at(160, job), 2).optim
    assert second.betas == pytest.approx((0.9**6, 0.99**6))


@pytest.mark.parametrize(("rule", "expected"), [("none", 4), ("sqrt", 2), ("linear", 1)])
def test_weight_decay_per_epoch_is_that_of_the_run(rule: BranchLrRule, expected: float) -> None:
    job = small_job(optim={"weight_decay_rule": "per_epoch"})
    point = at(160, job)
    optim = branch(point, 4, rule).optim
    of_run = 1e-3 * 0.05 / 16  # λ ε / B of the first phase, which the rule holds
    assert optim.weight_decay * optim.lr / (4 * 48) == pytest.approx(of_run)
    assert optim.weight_decay == pytest.approx(expected * 1e-3 * 3)
    assert optim.weight_decay_rule == "per_update"


def test_weight_decay_per_epoch_of_groups_is_refused() -> None:
    groups = [{"match": "*", "weight_decay": 0.1}]
    with pytest.raises(JobError, match=r"weight decay in optim\.groups is not possible in branches"):
        branch(at(160, small_job(optim={"weight_decay_rule": "per_epoch", "groups": groups})), 2)


def test_a_branch_of_an_adaptive_run_follows_its_decisions_up_to_the_checkpoint() -> None:
    job = measured_job({"name": "gradient_noise"})
    decided = tuple(
        Decision(samples, "gradient_noise", "", 16, batch, batch, 0.05, 0.05) for samples, batch in [(160, 48)]
    )
    assert at(160, job).global_batch == 16
    assert at(160, job, decided).global_batch == 48
    assert at(144, job, decided).global_batch == 16
    made = branch(at(208, job, decided), 2)
    assert (made.is_adaptive, made.trigger.name) == (False, "none")


def test_earlier_phases_need_not_be_formed_by_the_ranks_of_the_branches() -> None:
    point = at(160)
    plan = plan_branch(point, branch_request(point, (1, 2), None, None), 2, 6)  # 16 samples are 2 ghost batches
    assert [layout.ranks for layout in plan.layouts] == [1, 6]
    with pytest.raises(JobError, match=r"--factors: 1 · 48: .* = 5 ranks × 1\.20 ghost batches of 8; nearest: 40, 80"):
        plan_branch(point, branch_request(point, (1, 2), None, None), 1, 5)


def test_a_branch_is_a_valid_job_file() -> None:
    for job in (small_job(), small_job(optim=ADAM), measured_job({"name": "norm_test"})):
        made = branch(at(160, job), 2, ranks=2)
        assert parse_job(made.model_dump(mode="json", exclude_none=True)) == made


@pytest.mark.parametrize(
    ("factors", "samples", "expected"),
    [
        ((1, 2, 4, 8), None, (384, 32 * 384)),  # half an epoch is less than 32 blocks
        ((1, 2), 2000, (96, 2016)),
        ((3, 1, 2), 288 * 16, (288, 288 * 16)),
        ((1, 4, 6), 9300, (576, 9792)),
    ],
)
def test_all_branches_do_whole_updates(
    factors: tuple[int, ...], samples: int | None, expected: tuple[int, int]
) -> None:
    found = branch_request(at(160), factors, samples, None)
    assert (found.block, found.num_samples) == expected
    assert found.factors == tuple(sorted(factors))
    assert all(found.block % (factor * 48) == 0 for factor in factors)


def test_the_default_is_half_an_epoch_of_a_large_set() -> None:
    point = branch_point(small_job(data={"num_samples": 100_000}), (), 100_000, 1600)
    assert branch_request(point, (1, 2), None, None).num_samples == 50_016  # 16 · 2 · 1563


@pytest.mark.parametrize("factors", [(2, 4), (1, 1, 2), (0, 1), (1,), (-1, 1)])
def test_factors_without_1_or_repeated_are_refused(factors: tuple[int, ...]) -> None:
    with pytest.raises(JobError, match=r"--factors: must be distinct whole numbers >= 1, including 1"):
        branch_request(at(160), factors, None, None)


def test_too_few_samples_are_refused_with_the_smallest_number() -> None:
    with pytest.raises(JobError, match=r"--samples: 900 make 10 blocks of 96 samples, too few .* use >= 1,536"):
        branch_request(at(160), (1, 2), 900, None)


def test_no_branch_starts_at_the_end_or_within_an_update() -> None:
    end = 688
    with pytest.raises(JobError, match="688 is the end of the run"):
        at(end)
    with pytest.raises(JobError, match="no update of 48 starts at sample 168"):
        at(168)


def test_a_batch_of_the_whole_training_set_is_refused_with_the_nearest() -> None:
    with pytest.raises(JobError, match=r"--factors: 7 · 48: 336 must be below N = 300: .*; nearest: 296"):
        next_phase(at(160), 7)


def test_the_name_of_the_folder_of_branches_is_read_back() -> None:
    assert branches_folder(304, 512, "linear") == "at-304-for-512-linear"
    assert parse_branches_folder("at-304-for-512-linear") == (304, 512, "linear")
    for name in ("at-304-for-512-cubic", "at-304-for-512", "at-304-for-512-sqrt.removed", "at--1-for-512-none"):
        assert parse_branches_folder(name) is None
