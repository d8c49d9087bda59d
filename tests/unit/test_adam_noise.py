"""The noise scale of Adam, against formulas by hand and against the noise of simulated runs.

The simulation minimizes (w - x)²/2 over samples x of N(0, 1) in many independent coordinates. Noise dominates near the
minimum, where the variance of w over the coordinates is proportional to the noise scale.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.observers.advice_tables import summary
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.adaptive.noise_record import Observation
from hvd_batchgrow.schedule.advice import advise
from hvd_batchgrow.schedule.branch_advice import needed_lr_rule
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.recorded_run import RecordedRun
from hvd_batchgrow.schedule.twin import decay_twin

N = 10_000
LR = 1e-3
RULES = ["sqrt", "adam", "adam_linear"]


def plan_of(decisions: tuple[Decision, ...] = (), tree: dict[str, Any] | None = None, **schedule: Any) -> Plan:
    """Return the plan of a job with AdamW, B₀ = 64 and a boundary at epoch 4, where the noise scale falls by 4."""
    keys = {"policy": "grow", "epochs": 12.0, "global_batch": 64, "boundaries_epochs": [4.0], "noise_factor": 4.0}
    limit = {} if schedule.get("policy") == "decay" else {"max_batch": "N/10"}
    job = {
        "name": "averaged",
        "data": {"source": "synthetic_rows", "num_samples": N, "shape": [54], "num_classes": 7},
        "model": {"name": "dense7", "ghost_batch": 32},
        "optim": {"name": "adamw", "lr": LR},
        "schedule": keys | limit | schedule,
        **(tree or {}),
    }
    return compile_plan(parse_job(job), 1, N, None, decisions)


@cache
def variance(lr: float, batch: int, betas: tuple[float, float], updates: int = 3000) -> float:
    """Return the variance of w over coordinates and over the second half of a simulated run."""
    random = torch.Generator().manual_seed(0)
    w = torch.zeros(1000, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=lr, betas=betas, weight_decay=0.0)
    seen = []
    for update in range(updates):
        w.grad = w.detach() - torch.randn(1000, generator=random) / batch**0.5
        optimizer.step()
        if update >= updates // 2 and update % 20 == 0:
            seen.append(w.detach().square().mean())
    return float(torch.stack(seen).mean())


def test_adam_has_no_factor_of_the_momentum() -> None:
    """g = ε N/B = 0.001 · 10000/64 = 0.15625, and 10 times that for SGD with m = 0.9."""
    sgd = {"optim": {"name": "sgd", "lr": LR, "momentum": 0.9}}
    for plan, first in ((plan_of(), 0.15625), (plan_of(tree=sgd), 1.5625)):
        assert [phase.global_batch for phase in plan.schedule.phases] == [64, 256]
        noise = [plan.noise_scale(phase) for phase in plan.schedule.phases]
        assert noise == pytest.approx([first, first / 4], rel=1e-12)


@pytest.mark.parametrize("policy", ["grow", "seesaw", "decay"])
def test_a_new_beta1_changes_neither_batch_nor_learning_rate(policy: str) -> None:
    """The defect: β₁ from 0.9 to 0.98 multiplied the batch by 5, and with seesaw by 25."""
    schedule: dict[str, Any] = {"policy": policy, "noise_factor": 1.0, "momenta": [0.9, 0.98]}
    before, after = plan_of(**schedule).schedule.phases
    assert (after.global_batch, after.lr, after.momentum) == (before.global_batch, before.lr, 0.98)


def test_simulated_noise_does_not_depend_on_beta1() -> None:
    base = variance(LR, 64, (0.9, 0.999))
    assert variance(LR, 64, (0.98, 0.999)) / base == pytest.approx(1.0, abs=0.1)
    assert variance(LR, 320, (0.98, 0.999)) / base < 0.6  # the batch that the momentum of SGD would need


@pytest.mark.parametrize("rule", RULES)
def test_growth_under_a_rule_of_adam_keeps_noise_and_twin(rule: str) -> None:
    """κ = 4: ε √4 / √(4 B₀ B₀) is ε/B₀. The defect: g fell by 6.88, and the twin's learning rate with it."""
    plan = plan_of(lr_rule=rule)
    before, after = plan.schedule.phases
    assert (after.global_batch, after.lr) == pytest.approx((256, 2 * LR), rel=1e-12)
    assert [plan.noise_scale(phase) for phase in (before, after)] == pytest.approx([0.15625] * 2, rel=1e-12)
    beta2 = 0.999 if after.beta2 is None else after.beta2
    simulated = variance(after.lr, after.global_batch, (after.momentum, beta2))
    assert simulated / variance(LR, 64, (0.9, 0.999)) == pytest.approx(1.0, abs=0.1)
    twin = compile_plan(decay_twin(plan.job, N), 1, N)
    assert [phase.lr for phase in twin.schedule.phases] == pytest.approx([LR] * 2, rel=1e-12)
    assert [phase.global_batch for phase in twin.schedule.phases] == [64, 64]


@pytest.mark.parametrize("rule", RULES)
def test_advice_sees_that_the_noise_of_such_a_run_stayed(rule: str) -> None:
    plan = plan_of(lr_rule=rule)
    run = RecordedRun("runs/a", plan.job, N, plan.num_updates, tuple(plan.to_dict()["phases"]), ())
    assert not run.noise_fell


def test_advice_for_such_a_run_keeps_its_form_of_the_noise_scale() -> None:
    """ε ÷ 4 at epoch 4: ε/√B falls by 4, as with B × 4 and ε ÷ 2."""
    schedule = {"policy": "adaptive", "epochs": 12.0, "global_batch": 64, "exact_noise": True, "lr_rule": "adam"}
    schedule |= {"lr_boundaries_epochs": [4.0], "lr_factor": 4.0}
    plan = plan_of(tree={"schedule": schedule, "trigger": {"name": "plateau", "patience_epochs": 1.0}})
    starts = range(0, 12 * N, 500)
    seen = [
        Observation(at, at + 500, 5, 64, LR if at < 4 * N else LR / 4, 4, True, 5000.0, 4000.0, 6000.0) for at in starts
    ]
    run = RecordedRun("runs/a", plan.job, N, plan.num_updates, tuple(plan.to_dict()["phases"]), tuple(seen))
    assert needed_lr_rule(run) == "sqrt"
    advice = advise(run)
    assert advice.job.schedule.policy == "seesaw"
    phases = advice.plan.schedule.phases
    assert [phase.global_batch for phase in phases] == [64, 256]
    assert [phase.lr for phase in phases] == pytest.approx([LR, LR / 2], rel=1e-9)


def test_advice_names_the_rule_that_keeps_the_noise_scale_of_adam() -> None:
    plan = plan_of(policy="decay", noise_factor=1.0)
    seen = tuple(Observation(at, at + 500, 5, 64, LR, 4, True, 500.0, 400.0, 600.0) for at in range(0, 12 * N, 500))
    run = RecordedRun("runs/a", plan.job, N, plan.num_updates, tuple(plan.to_dict()["phases"]), seen)
    assert "to keep it constant: --lr-rule adam." in " ".join(summary(advise(run)))
    assert "this job keeps it constant: lr rises with the batch" in " ".join(summary(advise(run, lr_rule="adam")))


def test_the_linear_rule_keeps_the_plain_form() -> None:
    plan = plan_of(lr_rule="linear")
    assert [phase.lr for phase in plan.schedule.phases] == pytest.approx([LR, 4 * LR], rel=1e-12)
    assert [plan.noise_scale(phase) for phase in plan.schedule.phases] == pytest.approx([0.15625] * 2, rel=1e-12)


def test_the_twin_of_the_trigger_branch_keeps_its_learning_rate() -> None:
    """The defect: 0.000372 and 0.000145 after growth to 128 and 256."""
    decisions = (
        Decision(40_000, "branch", "", 64, 128, 128.0, LR, LR),
        Decision(40_000 + 128 * 313, "branch", "", 128, 256, 256.0, LR, LR),
    )
    schedule = {"policy": "adaptive", "epochs": 40.0, "global_batch": 64, "lr_rule": "adam"}
    tree = {"schedule": schedule, "trigger": {"name": "branch", "factors": [1, 2], "every_epochs": 4.0}}
    plan = plan_of(decisions, tree)
    assert [phase.global_batch for phase in plan.schedule.phases] == [64, 128, 256]
    twin = compile_plan(decay_twin(plan.job, N, decisions), 1, N)
    assert [phase.lr for phase in twin.schedule.phases] == pytest.approx([LR] * 3, rel=1e-12)


def test_the_exact_form_of_normalized_gradients() -> None:
    """g = ε √((N/B - 1) (N/B₀ - 1)). From B₀ = 64, of which the exact g falls by 4: N/B - 1 = 155.25/4, B = 256."""
    plan = plan_of(lr_rule="adam", exact_noise=True)
    first, later = plan.schedule.phases
    assert (first.global_batch, later.global_batch) == (64, 256)  # 251.2 requested, in units of 32
    assert later.wanted_batch == pytest.approx(10_000 / (1 + 155.25 / 4), rel=1e-12)
    assert plan.noise_scale(first) == pytest.approx(LR * 155.25, rel=1e-12)
    assert plan.noise_scale(later) == pytest.approx(2 * LR * math.sqrt((10_000 / 256 - 1) * 155.25), rel=1e-12)


@pytest.mark.parametrize("policy", ["grow", "seesaw", "decay"])
def test_a_raised_momentum_is_refused_for_adam(policy: str) -> None:
    message = (
        "schedule.raise_momentum_to: is for sgd and lars: the step of adamw is an average of gradients, whose noise β₁ "
        "does not change, so the batch would stay; remove it, and set β₁ as optim.betas"
    )
    with pytest.raises(JobError, match=message):
        plan_of(policy=policy, raise_momentum_to=0.98)
