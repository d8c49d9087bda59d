"""Growth by an imported curve: whole multiples of a unit, on any ranks; at the limit, the rate follows the curve."""

from __future__ import annotations

import math
import re
import sys
import types
from itertools import pairwise
from typing import Any

import pytest

from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.stages import make_start
from hvd_batchgrow.schedule.twin import compile_twin, decay_twin
from tests.unit.test_policies import ADAM, BOUNDARIES, N, batches, make_job, make_plan

COSINE: dict[str, Any] = {
    "policy": "import",
    "lr_schedule": "cosine",
    "epochs": 90.0,
    "global_batch": 128,
    "max_batch": "N/10",
}
RULE = "but every batch must be a multiple of"
FIRST_NOISE = 0.1 * N / (128 * 0.1)


def cosine_means(first: float, last: float, count: int) -> list[float]:
    """Return the means of (1 + cos πt)/2 over equal parts of t from `first` to `last`, by its antiderivative."""
    edges = [first + (last - first) * k / count for k in range(count + 1)]
    integrals = [(t + math.sin(math.pi * t) / math.pi) / 2 for t in edges]
    return [(b - a) * count / (last - first) for a, b in pairwise(integrals)]


# --- multiples of the first batch -----------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_imported_cosine_needs_only_a_first_batch_that_fits_the_ranks(ranks: int) -> None:
    """The defect: batches of 5, 7, 10, 18 and 46 ghost batches could not be formed on 4 ranks.

    128 over the cosine's means requests 129.7, 140.2, 164.9, 214.4, 317.6, 571.4 and 1472.4 samples, which are 1.01,
    1.10, 1.29, 1.68, 2.48, 4.46 and 11.50 times 128.
    """
    plan = make_plan(ranks, **COSINE)
    made, means = plan.schedule.phases[:7], cosine_means(0, 1, 8)
    assert [p.global_batch for p in made] == [128 * k for k in (1, 1, 1, 2, 2, 4, 12)]
    assert [p.lr for p in made] == pytest.approx(
        [0.1 * m * p.global_batch / 128 for m, p in zip(means, made, strict=False)]
    )
    assert [plan.noise_scale(p) for p in made] == pytest.approx([FIRST_NOISE * m for m in means[:7]], rel=1e-9)
    assert plan.schedule == make_plan(1, **COSINE).schedule
    assert {layout.ranks for layout in plan.layouts} == {ranks}
    assert not any(layout.uneven_ranks for layout in plan.layouts)


def test_ranks_that_cannot_form_the_first_batch_are_refused() -> None:
    with pytest.raises(
        JobError, match=r"phase 1 .*: global batch 128 = 3 ranks × 1.33 ghost batches of 32; nearest: 96, 192"
    ):
        make_plan(3, **COSINE)


def test_a_smaller_multiple_follows_the_curve_more_closely() -> None:
    """164.9, 214.4, 317.6, 571.4 and 1472.4 are 5.15, 6.70, 9.92, 17.86 and 46.01 times 32."""
    assert batches(**COSINE, batch_multiple=32)[:7] == [32 * k for k in (4, 4, 5, 7, 10, 18, 46)]
    assert batches(**COSINE, batch_multiple=64)[:7] == [64 * k for k in (2, 2, 3, 3, 5, 9, 23)]


def test_a_larger_start_is_a_multiple_too() -> None:
    """A rate of 0.15 requests 192 samples; 256 are formed, at twice the rate. Half the noise is twice the batch."""
    plan = make_plan(4, **{**COSINE, "lr_schedule": "steps", "lr_steps": [[30.0, 0.5]]}, lr_scale=1.5)
    first, second = plan.schedule.phases
    assert (first.global_batch, second.global_batch) == (256, 512)
    assert first.wanted_batch == pytest.approx(192)
    assert (first.lr, second.lr) == pytest.approx((0.2, 0.2))


@pytest.mark.parametrize(
    ("schedule", "faults"),
    [
        (
            {"max_batch": 5000},
            [f"max_batch: 5000 = 39.06 × 128, {RULE} 128; nearest: 4992, 5120; or set batch_multiple"],
        ),
        (
            {"batch_multiple": 96},
            [f"global_batch: 128 = 1.33 × 96, {RULE} 96; nearest: 96, 192"],
        ),
        (
            {"batch_multiple": 100},
            [
                "batch_multiple: 100 = 3.12 × 32, ghost batches of 32; nearest: 96 or 128",
                f"global_batch: 128 = 1.28 × 100, {RULE} 100; nearest: 100, 200",
            ],
        ),
        (
            {"global_batch": 100},
            ["global_batch: 100 = 3.12 ghost batches of 32, which are never cut; nearest: 96, 128"],
        ),
    ],
)  # fmt: skip
def test_another_batch_than_a_multiple_is_refused_once_with_the_nearest(
    schedule: dict[str, Any], faults: list[str]
) -> None:
    with pytest.raises(JobError) as caught:
        make_plan(**{**COSINE, **schedule})
    assert [str(f) for f in caught.value.faults if f.path.startswith("schedule")] == [
        f"schedule.{fault}" for fault in faults
    ]


# --- at the limit ---------------------------------------------------------------------------------


def test_at_the_limit_the_rate_follows_the_curve() -> None:
    """The defect: the last eighth of the run, 11.25 epochs, had one learning rate.

    N/10 = 5000 is 39 · 128 = 4992. The last eighth requests 10 037 samples, so it is cut into ⌈100/8⌉ = 13 parts.
    """
    plan = make_plan(4, **COSINE)
    made, means = plan.schedule.phases[7:], cosine_means(7 / 8, 1, 13)
    assert [p.start_epoch for p in made] == pytest.approx([78.75 + 11.25 * k / 13 for k in range(13)])
    assert [plan.noise_scale(p) for p in made] == pytest.approx([FIRST_NOISE * m for m in means], rel=1e-9)
    # 128 / means = 3632 and 4283 samples are 28.4 and 33.5 times 128; 5128 is above the limit
    assert [p.global_batch for p in made] == [28 * 128, 33 * 128, *[4992] * 11]
    assert [p.lr for p in made[2:]] == pytest.approx([0.1 * m * 4992 / 128 for m in means[2:]], rel=1e-9)
    assert all(after.lr < before.lr for before, after in pairwise(made))


@pytest.mark.parametrize(("num_phases", "parts"), [(1, 100), (3, 34), (8, 13), (50, 2), (99, 2), (100, 1), (250, 1)])
def test_the_parts_at_the_limit_are_at_most_a_hundredth_of_the_run(num_phases: int, parts: int) -> None:
    """A limit of the first batch, so that all of the curve is a decay of the learning rate."""
    plan = make_plan(**{**COSINE, "max_batch": 128, "num_phases": num_phases, "lr_schedule": "polynomial"})
    made, cut = plan.schedule.phases, num_phases * parts
    uncut = [k for k in range(num_phases) if 1 / (1 - (k + 0.5) / num_phases) <= 1.5]  # requests at most 192
    assert len(made) == len(uncut) + (num_phases - len(uncut)) * parts
    tail = made[len(uncut) :]
    assert {p.global_batch for p in made} == {128}
    assert tail[-1].lr == pytest.approx(0.1 * 0.5 / cut)  # the mean of 1 - t over the last of the equal parts


def test_a_part_at_the_limit_has_at_least_one_update() -> None:
    """A fifth of 25 000 samples is 5000, and 5000/512 = 9.8, so 9 parts and not 20.

    The fifths request 132, 162, 256, 607 and 3968 samples, the last two more than 512 + 128/2.
    """
    plan = make_plan(**{**COSINE, "epochs": 0.5, "num_phases": 5, "max_batch": 512})
    starts = [p.start_epoch for p in plan.schedule.phases]
    assert starts == pytest.approx([0.0, 0.1, 0.2, *(0.3 + 0.1 * k / 9 for k in range(18))])


def test_checkpoints_between_the_parts_of_a_phase_are_not_kept_for_ever() -> None:
    plan = make_plan(4, **COSINE)
    starts = [p.start_samples for p in plan.schedule.phases]
    assert plan.schedule.milestones == {*starts[1:8], plan.schedule.end_samples}
    assert len(starts) == 20
    grown = make_plan(policy="grow", **BOUNDARIES, max_batch="N/10").schedule
    assert grown.milestones == {phase.end_samples for phase in grown.phases}


def test_a_users_own_curve_is_averaged_over_the_finer_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves at epoch 15, 20 and 25: 1 over the first 15 epochs; the means over each 0.3 epochs at the limit."""
    module = types.ModuleType("my_schedule")
    module.halves = lambda epoch: 0.5 ** max(0, (epoch - 10) // 5)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_schedule", module)
    schedule = {**COSINE, "epochs": 30.0, "num_phases": 2, "lr_schedule": "my_schedule:halves", "max_batch": 256}
    made = make_plan(**schedule).schedule.phases
    assert [p.start_epoch for p in made] == pytest.approx([0.0, *(15 + 0.3 * k for k in range(50))])
    # 15 / 0.3 = 50 parts; the curve falls at 15, 20 = 15 + 16.67 · 0.3 and 25 = 15 + 33.33 · 0.3
    two_thirds = (2 * 0.5 + 1 * 0.25) / 3, (1 * 0.25 + 2 * 0.125) / 3
    expected = [0.5] * 16 + [two_thirds[0]] + [0.25] * 16 + [two_thirds[1]] + [0.125] * 16
    lr = [0.1 * m * p.global_batch / 128 for m, p in zip(expected, made[1:], strict=True)]
    assert [p.lr for p in made[1:]] == pytest.approx(lr, rel=1e-3)
    assert [p.global_batch for p in made] == [128, *[256] * 50]


def test_a_function_that_returns_learning_rates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_schedule")
    module.rates = lambda epoch: 0.1 * 0.5**epoch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_schedule", module)
    with pytest.raises(JobError, match=r"rates\(0\) is 0.1, the learning rate itself; it must return a multiple of it"):
        make_plan(**{**COSINE, "lr_schedule": "my_schedule:rates"})


def test_a_step_list_is_not_cut_at_the_limit() -> None:
    steps = [[30.0, 0.1], [60.0, 0.01]]
    made = make_plan(**{**COSINE, "lr_schedule": "steps", "lr_steps": steps}).schedule.phases
    assert [(p.start_epoch, p.global_batch) for p in made] == [(0.0, 128), (30.0, 1280), (60.0, 4992)]


def test_the_twin_follows_the_finer_parts() -> None:
    plan = make_plan(4, **COSINE)
    twin = compile_twin(decay_twin(plan.job, N), 4, N)
    means = [*cosine_means(0, 7 / 8, 7), *cosine_means(7 / 8, 1, 13)]
    assert [p.lr for p in twin.schedule.phases] == pytest.approx([0.1 * m for m in means], rel=1e-9)


# --- other policies -------------------------------------------------------------------------------

ODD: dict[str, Any] = {**BOUNDARIES, "noise_factor": [1.25, 1.4, 2.5], "max_batch": 4992}
ADABATCH: dict[str, Any] = {
    "epochs": 80.0,
    "every_epochs": 20.0,
    "global_batch": 128,
    "batch_factor": 1.5,
    "max_batch": 4992,
}


def test_a_growth_that_these_ranks_cannot_form_names_the_multiple_that_they_can() -> None:
    """128 · 1.25 = 160 and 160 · 1.4 = 224 are 5 and 7 ghost batches; 224 · 2.5 = 560 rounds to 18."""
    assert batches(policy="grow", **ODD) == [128, 160, 224, 576]
    hint = r"or layout.uneven_ranks = true; or schedule.batch_multiple = 128, and the learning rate makes up for"
    with pytest.raises(JobError, match=re.compile(rf"160 = 4 ranks × 1.25 .*{hint}.*224 .*{hint}", re.DOTALL)):
        make_plan(4, policy="grow", **ODD)
    with pytest.raises(JobError) as caught:  # no multiple helps: the first batch cannot be formed either
        make_plan(3, policy="grow", **ODD)
    assert "batch_multiple" not in str(caught.value)
    with pytest.raises(JobError, match=r"schedule.batch_multiple = 128\n"):  # the rule alone sets the learning rate
        make_plan(4, policy="grow", **ODD, lr_rule="linear")


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    ("job", "multiples", "falls"),
    [
        # 160, 224 and 560 are 1.25, 1.75 and 4.375 times 128
        ({"policy": "grow", **ODD}, [1, 1, 2, 4], [1.25, 1.4, 2.5]),
        ({"policy": "hybrid", "growing_boundaries": 2, **ODD}, [1, 1, 2, 2], [1.25, 1.4, 2.5]),
        ({"optim": ADAM, "policy": "seesaw", **ODD}, [1, 1, 2, 4], [1.25, 1.4, 2.5]),
        # 1.5, 2.25 and 3.375 times 128; a tie is rounded up
        ({"policy": "adabatch", **ADABATCH}, [1, 2, 2, 3], [2.0, 2.0, 2.0]),
    ],
    ids=lambda value: value.get("policy", "") if isinstance(value, dict) else "",
)  # fmt: skip
def test_every_policy_that_grows_takes_a_multiple_and_keeps_its_noise(
    ranks: int, job: dict[str, Any], multiples: list[int], falls: list[float]
) -> None:
    plan = make_plan(ranks, **job, batch_multiple=128)
    assert [p.global_batch for p in plan.schedule.phases] == [128 * k for k in multiples]
    noise = [plan.noise_scale(p) for p in plan.schedule.phases]
    assert [a / b for a, b in pairwise(noise)] == pytest.approx(falls, rel=1e-9)


def test_a_fraction_of_n_is_cut_to_the_multiple() -> None:
    """N/10 = 5000 is 156 · 32, which 8 ranks cannot share; it is 19 · 256 = 4864."""
    schedule = {**BOUNDARIES, "global_batch": 256, "max_batch": "N/10"}
    assert make_start(make_job(policy="grow", **schedule), N).max_batch == 4992
    plan = make_plan(8, policy="grow", **schedule, batch_multiple=256)
    assert [p.global_batch for p in plan.schedule.phases] == [256, 1280, 4864, 4864]


def test_decay_has_no_multiple() -> None:
    with pytest.raises(JobError, match=r"schedule.batch_multiple: unknown key"):
        make_plan(policy="decay", **BOUNDARIES, batch_multiple=32)


def test_growth_that_a_multiple_prevents_names_it() -> None:
    """A curve from 1 to 0.8 requests at most 128 / 0.81 = 158 samples."""
    plan = compile_plan(make_job(**COSINE, end_lr_fraction=0.8), 1, N)
    (note,) = [note for note in plan.notes if "grow" in note]
    assert note.startswith("the batch never grows, and the learning rate decays instead at every boundary: ")
    assert note.endswith("is rounded to 128, a whole multiple of 128; use a smaller schedule.batch_multiple")
