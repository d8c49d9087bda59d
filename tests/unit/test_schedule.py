"""Policies, phases and plans against counts worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.noise import NoiseScale
from hvd_batchgrow.schedule.phases import Schedule, compile_schedule
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.stages import Stage
from hvd_batchgrow.schedule.twin import decay_twin
from tests.helpers import small_job

CIFAR = 50_000


def cifar_job(policy: str, lr: float, momentum: float, batch: int) -> Job:
    schedule = {
        "policy": policy,
        "epochs": 200.0,
        "boundaries_epochs": [60.0, 120.0, 160.0],
        "noise_factor": 5.0,
        "global_batch": batch,
        **({"max_batch": 5120} if policy == "grow" else {}),
    }
    return small_job(
        schedule=schedule,
        optim={"lr": lr, "momentum": momentum},
        data={"num_samples": CIFAR},
        model={"ghost_batch": 128},
        layout={"max_micro_batch": 128},
    )


@pytest.mark.parametrize(
    ("policy", "lr", "momentum", "batch", "batches", "updates", "total"),
    [
        ("decay", 0.1, 0.9, 128, [128] * 4, [23438, 23437, 15625, 15625], 78125),
        ("grow", 0.1, 0.9, 128, [128, 640, 3200, 5120], [23438, 4688, 625, 391], 29142),
        ("grow", 0.5, 0.9, 640, [640, 3200, 5120, 5120], [4688, 938, 391, 390], 6407),
        ("grow", 0.5, 0.98, 3200, [3200, 5120, 5120, 5120], [938, 586, 391, 390], 2305),
    ],
)
def test_update_counts_of_smith_et_al(
    policy: str, lr: float, momentum: float, batch: int, batches: list[int], updates: list[int], total: int
) -> None:
    plan = compile_plan(cifar_job(policy, lr, momentum, batch), 1, CIFAR)
    phases = plan.schedule.phases
    assert [phase.global_batch for phase in phases] == batches
    assert [phase.num_updates for phase in phases] == updates
    assert plan.num_updates == total
    noise = [plan.noise_scale(phase) for phase in phases]
    assert noise == pytest.approx([noise[0] / 5**k for k in range(4)], rel=1e-12)


def test_what_the_batch_cannot_take_the_learning_rate_does() -> None:
    plan = compile_plan(cifar_job("grow", 0.1, 0.9, 128), 1, CIFAR)
    # 128 · 5³ = 16 000 is cut to 5 120: the rest, 3.125, is decayed.
    assert [phase.lr for phase in plan.schedule.phases] == pytest.approx([0.1, 0.1, 0.1, 0.1 / 3.125], rel=1e-15)


def test_a_share_of_the_training_set_is_rounded_down_to_whole_ghost_batches() -> None:
    job = small_job(schedule={"max_batch": "N/10"}, data={"num_samples": 1000})
    plan = compile_plan(job, 1, 1000)
    # N/10 = 100 = 12.5 ghost batches of 8
    assert [phase.global_batch for phase in plan.schedule.phases] == [16, 48, 96, 96]
    assert plan.schedule.phases[2].lr == pytest.approx(0.05 * 96 / 144)


def test_noise_scale_and_its_inverse() -> None:
    # 0.1 · 50 000 / (128 · (1 - 0.9))
    assert NoiseScale(CIFAR).of(0.1, 0.9, 128) == pytest.approx(390.625)
    assert NoiseScale(CIFAR).lr_for(390.625, 0.9, 128) == pytest.approx(0.1)


def test_the_twin_has_the_same_noise_at_the_same_boundaries() -> None:
    job = cifar_job("grow", 0.1, 0.9, 128)
    grown, twin = (compile_plan(j, 1, CIFAR) for j in (job, decay_twin(job, CIFAR)))
    assert [p.start_epoch for p in grown.schedule.phases] == [p.start_epoch for p in twin.schedule.phases]
    assert [grown.noise_scale(p) for p in grown.schedule.phases] == pytest.approx(
        [twin.noise_scale(p) for p in twin.schedule.phases], rel=1e-12
    )
    assert {p.global_batch for p in twin.schedule.phases} == {128}


stages = st.lists(st.tuples(st.floats(0.01, 5), st.integers(1, 700)), min_size=1, max_size=6)


@given(stages=stages, num_samples=st.integers(1, 5000))
def test_phases_follow_each_other_and_reach_every_boundary(stages: list[tuple[float, int]], num_samples: int) -> None:
    starts = [0.0]
    for length, _ in stages:
        starts.append(starts[-1] + length)
    wanted = [Stage(start, 0.1, 0.9, batch, batch) for start, (_, batch) in zip(starts, stages, strict=False)]
    schedule = compile_schedule(wanted, starts[-1], num_samples)
    counter = 0
    for phase, end in zip(schedule.phases, starts[1:], strict=True):
        assert phase.start_samples == counter
        boundary = math.floor(Fraction(str(end)) * num_samples + Fraction(1, 2))
        counter += phase.num_updates * phase.global_batch
        assert counter >= boundary
        assert phase.num_updates == 0 or counter - phase.global_batch < boundary
    assert schedule.end_samples == counter


@given(stages=stages, num_samples=st.integers(1, 2000))
def test_walking_the_counter_takes_the_phases_in_turn(stages: list[tuple[float, int]], num_samples: int) -> None:
    starts = [float(k) for k in range(len(stages))]
    wanted = [Stage(start, 0.1, 0.9, batch, batch) for start, (_, batch) in zip(starts, stages, strict=True)]
    schedule = compile_schedule(wanted, float(len(stages)), num_samples)
    samples, taken = 0, [0] * len(stages)
    while samples < schedule.end_samples:
        index = schedule.index_at(samples)
        assert schedule.updates_at(samples) == sum(taken)
        taken[index] += 1
        samples += schedule.phases[index].global_batch
    assert taken == [phase.num_updates for phase in schedule.phases]
    assert samples == schedule.end_samples


def test_a_counter_outside_the_run_is_an_error() -> None:
    schedule: Schedule = compile_schedule([Stage(0.0, 0.1, 0.9, 10, 10)], 1.0, 100)
    for samples in (-1, 100):
        with pytest.raises(ValueError, match=r"outside the run: 0 … 99"):
            schedule.at(samples)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"boundaries_epochs": [1.5, 1.0]}, r"schedule.boundaries_epochs: must rise: 1 follows 1.5; nearest: "),
        (
            {"boundaries_epochs": [1.0, 2.2]},
            r"must end before epochs = 2.2, got 2.2; nearest: \[1.0\]",
        ),
        (
            {"max_batch": 8},
            r"schedule.max_batch: 8 samples of N = 300 is below the first batch 16; "
            r"use max_batch >= 16, or global_batch <= 8$",
        ),
        (
            {"max_batch": "N/30"},
            r"schedule.max_batch: N/30 = 10 of N = 300 samples, rounded down to a multiple of model.ghost_batch = 8, "
            r"is 8: below the first batch 16; use max_batch >= 16, or global_batch <= 8$",
        ),
        (
            {"max_batch": "N/10", "global_batch": 32, "batch_multiple": 32},
            r"N/10 = 30 of N = 300 samples, rounded down to a multiple of batch_multiple = 32, is 0: "
            r"below the first batch 32; use max_batch >= 32$",
        ),
        ({"max_batch": "N/10", "global_batch": 304}, r"below the first batch 304; use global_batch <= 24$"),
        (
            {"global_batch": 20},
            r"schedule.global_batch: 20 = 2.50 ghost batches of 8, which are never cut; nearest: 16, 24",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        compile_plan(small_job(schedule=schedule), 1, 300)


def test_a_limit_rounded_to_the_first_batch_says_so() -> None:
    schedule = {"policy": "adaptive", "epochs": 2, "global_batch": 640, "max_batch": "N/10"}
    with pytest.raises(JobError) as caught:
        compile_plan(parse_job({**small_job().model_dump(), "schedule": schedule}), 1, 4000)
    assert str(caught.value).endswith(
        "schedule.max_batch: N/10 = 400 of N = 4000 samples, rounded down to a multiple of global_batch = 640, is 0: "
        "below the first batch 640; use max_batch >= 640, or global_batch <= 400"
    )


def test_a_plan_for_no_ranks_is_refused() -> None:
    with pytest.raises(JobError, match="ranks: must be at least 1, got 0"):
        compile_plan(small_job(), 0, 300)


def test_every_phase_that_cannot_be_formed_is_named() -> None:
    with pytest.raises(JobError) as caught:
        compile_plan(small_job(), 5, 300)
    assert [fault.path for fault in caught.value.faults] == [
        "phase 1 (from epoch 0)",
        "phase 2 (from epoch 0.5)",
        "phase 3 (from epoch 1)",
    ]


def test_json_has_what_a_script_needs() -> None:
    tree = compile_plan(small_job(), 2, 300).to_dict()
    assert tree["num_samples"] == 300
    assert tree["num_updates"] == sum(phase["num_updates"] for phase in tree["phases"])
    for phase in tree["phases"]:
        assert phase["ranks"] * phase["accumulation"] * phase["micro_batch"] == phase["global_batch"]
        assert phase["noise_scale"] == pytest.approx(phase["lr"] * 300 / (phase["global_batch"] * 0.1))
    assert math.isclose(tree["phases"][0]["noise_scale"], 3 * tree["phases"][1]["noise_scale"])
