"""`lr_rule`: κ is that of the batch that was formed. The values expected here are worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest, form_decision
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.transitions import describe_transitions
from tests.helpers import NUM_TRAIN, measured_job

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}


def plan_of(optim: dict[str, Any] = SGD, num_samples: int = 60_000, group: int = 32, **schedule: Any) -> Plan:
    tree = {
        "name": "ruled",
        "data": {"source": "synthetic_images", "num_samples": num_samples},
        "model": {"name": "small_conv_net", "ghost_batch": group},
        "optim": optim,
        "schedule": {"policy": "grow", "epochs": 4.0, "boundaries_epochs": [2.0], **schedule},
    }
    return compile_plan(parse_job(tree), 1, num_samples)


@pytest.mark.parametrize(("rule", "multiple"), [("linear", 1.4), ("sqrt", 1.4**0.5)])
def test_a_batch_that_was_rounded_scales_the_rate_by_what_was_formed(rule: str, multiple: float) -> None:
    """160 · 1.3 = 208 = 6.5 ghost batches of 32: 7 of them are formed, 224, and κ = 224/160 = 1.4.

    The defect: ε × 1.508 = 1.4 · 224/208, by which the noise scale rose.
    """
    plan = plan_of(global_batch=160, noise_factor=1.3, lr_rule=rule)
    before, after = plan.schedule.phases
    assert (before.global_batch, after.global_batch) == (160, 224)
    assert after.wanted_batch == pytest.approx(208, rel=1e-12)
    assert after.lr / before.lr == pytest.approx(multiple, rel=1e-12)
    # g = ε N / (B (1-m)): under linear it stays, 0.1 · 60000 / (160 · 0.1) = 375; under sqrt it falls by √κ
    noise = {"linear": 375.0, "sqrt": 375.0 / 1.4**0.5}[rule]
    assert plan.noise_scale(after) == pytest.approx(noise, rel=1e-12)


def test_a_batch_at_its_limit_scales_the_rate_by_what_was_formed() -> None:
    """128 · 5 = 640 is cut to 512: κ = 4, at this boundary and at the next."""
    plan = plan_of(global_batch=128, noise_factor=5.0, max_batch=512, boundaries_epochs=[2.0, 3.0], lr_rule="linear")
    assert [phase.global_batch for phase in plan.schedule.phases] == [128, 512, 512]
    assert [phase.lr for phase in plan.schedule.phases] == pytest.approx([0.1, 0.4, 0.4], rel=1e-12)
    assert "(requested 640, formed 512: lr follows lr_rule)" in describe_transitions(plan)[0]


@pytest.mark.parametrize(("rule", "beta1"), [("adam", 0.9 ** (5 / 3)), ("adam_linear", 1 - 0.1 * 5 / 3)])
def test_adams_set_uses_the_batch_that_was_formed(rule: str, beta1: float) -> None:
    """96 · 1.7 = 163.2 = 5.1 ghost batches: 160 is formed, κ = 5/3."""
    after = plan_of(ADAM, global_batch=96, noise_factor=1.7, lr_rule=rule).schedule.phases[1]
    assert after.global_batch == 160
    assert after.lr == pytest.approx(1e-3 * (5 / 3) ** 0.5, rel=1e-12)
    assert (after.momentum, after.eps) == pytest.approx((beta1, 1e-8 / (5 / 3) ** 0.5), rel=1e-9)


def test_half_lives_in_samples_hold_for_any_growth() -> None:
    """β₁ = 0.9 and κ = 46.875: the linear form would need β₁ = 1 - 4.7, and is refused."""
    schedule: dict[str, Any] = {"global_batch": 128, "noise_factor": 46.875, "max_batch": "N/10"}
    before, after = plan_of(ADAM, lr_rule="adam", **schedule).schedule.phases
    assert (before.global_batch, after.global_batch) == (128, 5984)  # 6000 is not a multiple of 32
    betas = zip((before.momentum, 0.999), (after.momentum, after.beta2), strict=True)
    for first, later in betas:
        assert later is not None
        samples = [math.log(0.5) / math.log(b) * batch for b, batch in ((first, 128), (later, 5984))]
        assert samples[1] == pytest.approx(samples[0], rel=1e-9)
    with pytest.raises(JobError, match=r"needs κ \(1-β₁\) < 1, but 5984/128 · 0.1 = 4.675; use 'adam', or grow to"):
        plan_of(ADAM, lr_rule="adam_linear", **schedule)


def test_a_larger_start_is_where_kappa_begins() -> None:
    """128 · 1.3 = 166.4 becomes 160 with ε = 0.125, which keeps the noise scale; then 320 is formed, κ = 2."""
    before, after = plan_of(global_batch=128, noise_factor=2.0, lr_scale=1.3, lr_rule="linear").schedule.phases
    assert (before.global_batch, after.global_batch) == (160, 320)
    assert (before.lr, after.lr) == pytest.approx((0.125, 0.25), rel=1e-12)


@pytest.mark.parametrize(("rule", "power"), [("none", None), ("linear", 1.0), ("sqrt", 0.5)])
def test_growth_by_a_trigger_scales_the_rate_by_what_was_formed(rule: str, power: float | None) -> None:
    """57 samples are 3.6 multiples of 16: 64 are formed, κ = 4. Without a rule the rate makes up for the rounding."""
    job = measured_job({"name": "norm_test"}, schedule={"lr_rule": rule})
    decision = form_decision(job, NUM_TRAIN, (), 160, BatchRequest("planted", batch=57.0), {})
    assert decision is not None
    phase = compile_plan(job, 1, NUM_TRAIN, None, (decision,)).schedule.phases[1]
    assert phase.global_batch == 64
    assert phase.lr == pytest.approx(0.05 * 64 / 57 if power is None else 0.05 * 4**power, rel=1e-12)


@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5)])
def test_a_plateau_divides_the_rate_once_the_batch_is_at_its_limit(rule: str, power: float) -> None:
    """16 → 80 → 96, where 400 would be: κ = 5, then 6. Two more plateaus divide ε by 5 each."""
    job = measured_job({"name": "plateau", "patience_epochs": 1.0}, schedule={"lr_rule": rule})
    decisions: tuple[Any, ...] = ()
    for samples in (160, 160 + 160, 160 + 160 + 192, 160 + 160 + 192 + 96):
        decision = form_decision(job, NUM_TRAIN, decisions, samples, BatchRequest("planted", noise_factor=5.0), {})
        decisions = (*decisions, decision)
    phases = compile_plan(job, 1, NUM_TRAIN, None, decisions).schedule.phases
    assert [phase.global_batch for phase in phases] == [16, 80, 96, 96, 96]
    rates = [0.05, 0.05 * 5**power, 0.05 * 6**power, 0.01 * 6**power, 0.002 * 6**power]
    assert [phase.lr for phase in phases] == pytest.approx(rates, rel=1e-12)


def test_the_page_states_kappa() -> None:
    page = (Path(__file__).parents[2] / "docs" / "job-file.md").read_text()
    assert "κ = B / B₀" in page
