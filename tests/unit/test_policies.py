"""Every policy against its formula, worked out here."""

from __future__ import annotations

import math
import re
import sys
import types
from itertools import pairwise
from typing import Any

import pytest

from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.transitions import describe_transitions
from hvd_batchgrow.schedule.twin import compile_twin, decay_twin

N = 50_000
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
ADAM: dict[str, Any] = {"name": "adam", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}
BOUNDARIES: dict[str, Any] = {
    "epochs": 200.0,
    "boundaries_epochs": [60.0, 120.0, 160.0],
    "noise_factor": 5.0,
    "global_batch": 128,
}


def make_job(optim: dict[str, Any] | None = None, layout: dict[str, Any] | None = None, **schedule: Any) -> Job:
    return parse_job(
        {
            "name": "made",
            "data": {"source": "cifar10"},
            "model": {"name": "resnet20", "ghost_batch": 32},
            "optim": optim or SGD,
            "schedule": schedule,
            "layout": layout or {},
        }
    )


def make_plan(ranks: int = 1, **job: Any) -> Plan:
    return compile_plan(make_job(**job), ranks, N)


def phases(**job: Any) -> tuple[Phase, ...]:
    return make_plan(**job).schedule.phases


def batches(**job: Any) -> list[int]:
    return [phase.global_batch for phase in phases(**job)]


def test_late_holds_the_first_batch_and_then_grows_to_the_limit() -> None:
    """0.7 of 200 epochs are 140. 128 → 5120 is × 40; in two steps each × √40: 128 · 6.325 = 809.5, formed 800."""
    late: dict[str, Any] = {
        "policy": "late",
        "epochs": 200.0,
        "global_batch": 128,
        "max_batch": 5120,
        "hold_fraction": 0.7,
    }
    once = phases(**late)
    assert [(p.start_epoch, p.global_batch, p.lr) for p in once] == [(0, 128, 0.1), (pytest.approx(140), 5120, 0.1)]
    twice = make_plan(**late, growth_steps=2)
    assert [p.start_epoch for p in twice.schedule.phases] == pytest.approx([0, 140, 170])
    assert [p.global_batch for p in twice.schedule.phases] == [128, 800, 5120]
    # the learning rate makes up for the rounding to whole ghost batches: 800/809.54
    assert [p.lr for p in twice.schedule.phases] == pytest.approx([0.1, 0.1 * 800 / (128 * 40**0.5), 0.1], rel=1e-12)
    # ε N / (B (1-m)) falls by √40 at each step, and so does that of the twin, whose batch stays
    noise = [0.1 * N / (128 * 0.1 * 40 ** (k / 2)) for k in range(3)]
    twin = compile_plan(decay_twin(twice.job, N), 1, N)
    for plan in (twice, twin):
        assert [plan.noise_scale(p) for p in plan.schedule.phases] == pytest.approx(noise, rel=1e-9)
    assert {p.global_batch for p in twin.schedule.phases} == {128}
    assert [p.start_epoch for p in twin.schedule.phases] == pytest.approx([0, 140, 170])


def test_late_growth_follows_a_learning_rate_rule() -> None:
    late = {"policy": "late", "epochs": 10.0, "global_batch": 128, "max_batch": 512, "hold_fraction": 0.5}
    assert [p.lr for p in phases(**late, lr_rule="sqrt")] == pytest.approx([0.1, 0.2], rel=1e-12)


def test_hybrid_grows_first_and_decays_then() -> None:
    made = phases(policy="hybrid", growing_boundaries=1, **BOUNDARIES)
    assert [p.global_batch for p in made] == [128, 640, 640, 640]
    assert [p.lr for p in made] == pytest.approx([0.1, 0.1, 0.02, 0.004], rel=1e-12)


def test_a_larger_start_keeps_the_noise() -> None:
    base = make_plan(policy="grow", max_batch=5120, **BOUNDARIES)
    larger = make_plan(policy="grow", max_batch=5120, lr_scale=5.0, raise_momentum_to=0.98, **BOUNDARIES)
    first = larger.schedule.phases[0]
    # B · 5 for ε · 5, and · (1 - 0.9)/(1 - 0.98) = 5 for the momentum
    assert (first.lr, first.momentum, first.global_batch) == (0.5, 0.98, 3200)
    assert [larger.noise_scale(p) for p in larger.schedule.phases] == pytest.approx(
        [base.noise_scale(p) for p in base.schedule.phases], rel=1e-12
    )


def test_a_larger_start_that_is_rounded_or_cut_says_what_was_wanted() -> None:
    plan = make_plan(policy="grow", max_batch=5120, lr_scale=1.3, **BOUNDARIES)
    first = plan.schedule.phases[0]
    # 128 · 1.3 = 166.4 is 5.2 ghost batches of 32: 160, and ε = 0.1 · 160/128
    assert (first.wanted_batch, first.global_batch) == pytest.approx((166.4, 160))
    assert first.lr == pytest.approx(0.125)
    first = phases(policy="hybrid", max_batch=5120, lr_scale=100.0, **BOUNDARIES)[0]
    assert (first.wanted_batch, first.global_batch, first.lr) == pytest.approx((12_800, 5120, 4.0))


def test_exact_noise_uses_the_finite_training_set() -> None:
    # Under B f the noise falls by 1.0 % too much at 128 → 640 and by 9.1 % at 1 024 → 5 120 (formulas §1)
    for batch, share in ((128, 0.010), (1024, 0.091)):
        assert (N / batch - 1) / (N / (5 * batch) - 1) / 5 - 1 == pytest.approx(share, abs=5e-4)
        schedule = {**BOUNDARIES, "boundaries_epochs": [60.0], "global_batch": batch}
        plan = make_plan(policy="grow", exact_noise=True, max_batch=5120, **schedule)
        before, after = plan.schedule.phases
        assert after.wanted_batch == pytest.approx(N / (1 + (N / batch - 1) / 5), rel=1e-12)
        # rounded to whole ghost batches, the learning rate makes the noise exact
        assert after.global_batch % 32 == 0
        g = [p.lr / (1 - 0.9) * (N / p.global_batch - 1) for p in (before, after)]
        assert g[0] / g[1] == pytest.approx(5, rel=1e-12)
        assert plan.noise_scale(after) == pytest.approx(g[1], rel=1e-12)


def test_adabatch_multiplies_by_beta_and_alpha() -> None:
    made = phases(policy="adabatch", epochs=100.0, every_epochs=20.0, global_batch=128, max_batch="N/10")
    assert [p.start_epoch for p in made] == [0, 20, 40, 60, 80]
    assert [p.global_batch for p in made] == [128, 256, 512, 1024, 2048]
    assert [p.lr for p in made] == pytest.approx([0.1 * 0.75**k for k in range(5)], rel=1e-12)


def test_adabatch_at_its_limit_decays_by_alpha_over_beta() -> None:
    made = phases(policy="adabatch", epochs=60.0, every_epochs=20.0, global_batch=128, max_batch=256)
    assert [p.lr for p in made] == pytest.approx([0.1, 0.075, 0.075 * 0.375], rel=1e-12)


def test_adabatch_with_exact_noise_falls_by_beta_over_alpha_however_far_it_grows() -> None:
    """The defect: 128 · 2⁹ is beyond N, where the exact noise scale is below 0, and so was the learning rate."""
    plan = make_plan(
        policy="adabatch", epochs=12.0, every_epochs=1.0, global_batch=128, max_batch="N/2", exact_noise=True
    )
    made = plan.schedule.phases
    wanted = [N / (1 + (N / 128 - 1) / 2**k) for k in range(12)]
    assert [p.wanted_batch for p in made] == pytest.approx(wanted, rel=1e-9)
    noise = [plan.noise_scale(p) for p in made]
    assert [a / b for a, b in pairwise(noise)] == pytest.approx([2 / 0.75] * 11, rel=1e-9)
    assert noise[0] == pytest.approx(0.1 / 0.1 * (N / 128 - 1), rel=1e-12)
    assert min(p.lr for p in made) > 0


def test_steps_are_megatrons_string() -> None:
    made = phases(policy="steps", epochs=10.0, batch_steps="0:768 250000:1536")
    assert [(p.global_batch, p.lr) for p in made] == [(768, 0.1), (1536, 0.1)]
    # 250 000 / 768 = 325.5
    assert [p.num_updates for p in made] == [326, math.ceil((500_000 - 326 * 768) / 1536)]


@pytest.mark.parametrize(("rule", "ratios"), [("none", [1, 1]), ("linear", [1, 4]), ("sqrt", [1, 2])])
def test_learning_rate_rules(rule: str, ratios: list[float]) -> None:
    made = phases(policy="steps", epochs=10.0, batch_steps="0:256 250000:1024", lr_rule=rule)
    assert [p.lr / 0.1 for p in made] == pytest.approx(ratios, rel=1e-12)


@pytest.mark.parametrize(("rule", "betas"), [("adam", (0.6561, 0.996006)), ("adam_linear", (0.6, 0.996))])
def test_adams_set(rule: str, betas: tuple[float, float]) -> None:
    made = phases(optim=ADAM, policy="steps", epochs=10.0, batch_steps="0:256 250000:1024", lr_rule=rule)
    after = made[1]
    # κ = 4: ε √κ and eps/√κ; 0.9⁴ = 0.6561 and 0.999⁴ = 0.996006 (by half-life), or 1-βᵢ → κ (1-βᵢ) (linear)
    assert after.lr == pytest.approx(2e-3)
    assert (after.momentum, after.beta2) == pytest.approx(betas, rel=1e-7)
    assert after.eps == pytest.approx(0.5e-8)


@pytest.mark.parametrize(("rule", "beta1"), [("sqrt", 0.9), ("adam", 0.9**4), ("adam_linear", 0.6)])
def test_adams_set_starts_from_the_scaled_learning_rate(rule: str, beta1: float) -> None:
    schedule = BOUNDARIES | {"epochs": 10.0, "boundaries_epochs": [5.0], "noise_factor": 4.0}
    plan = make_plan(policy="grow", optim=ADAM, lr_rule=rule, lr_scale=2.0, max_batch=4096, **schedule)
    before, after = plan.schedule.phases
    # g ∝ ε/√B: ε × 2 and B × 2² have the same noise scale; then κ = 4
    assert (before.lr, before.momentum, before.global_batch) == pytest.approx((2e-3, 0.9, 512))
    assert plan.noise_scale(before) == pytest.approx(1e-3 * N / 128)
    assert (after.lr, after.momentum, after.global_batch) == pytest.approx((4e-3, beta1, 2048))


def test_seesaw_shares_the_factor_between_rate_and_batch() -> None:
    plan = make_plan(optim=ADAM, policy="seesaw", max_batch=5120, **{**BOUNDARIES, "noise_factor": 4.0})
    made = plan.schedule.phases
    assert [p.global_batch for p in made] == [128, 512, 2048, 5120]
    # ε ÷ √4 each; at the limit 128 · 4³ = 8 192 is cut: ε/√B is what must fall by 4, so ε takes √(8192/5120) more
    rates = [1e-3, 1e-3 / 2, 1e-3 / 4, 1e-3 / 8 / math.sqrt(8192 / 5120)]
    assert [p.lr for p in made] == pytest.approx(rates, rel=1e-12)
    noise = [plan.noise_scale(p) for p in made]
    assert [a / b for a, b in pairwise(noise)] == pytest.approx([4, 4, 4], rel=1e-12)


def test_seesaw_with_a_larger_start_has_the_noise_scale_of_normalized_gradients() -> None:
    """g = ε N / √(B B₀): ε × 2 at the start takes B × 4. Then B doubles, ε falls by √2 and g by 2."""
    short: dict[str, Any] = {"epochs": 3.0, "boundaries_epochs": [1.0, 2.0], "noise_factor": 2.0, "global_batch": 128}
    job = make_job(optim={**ADAM, "name": "adamw"}, policy="seesaw", lr_scale=2.0, max_batch="N/10", **short)
    plan = compile_plan(job, 1, 60_000)
    assert [p.global_batch for p in plan.schedule.phases] == [512, 1024, 2048]
    # 0.002 · 60 000 / √(512 · 128) = 120 / 256
    noise = [plan.noise_scale(p) for p in plan.schedule.phases]
    assert noise == pytest.approx([0.46875, 0.234375, 0.1171875], rel=1e-12)


def test_an_imported_step_list_becomes_batches() -> None:
    steps = [[30.0, 0.1], [60.0, 0.01]]
    made = phases(policy="import", epochs=90.0, global_batch=128, lr_schedule="steps", lr_steps=steps, max_batch="N/10")
    assert [p.global_batch for p in made] == [128, 1280, 4992]
    assert made[2].lr == pytest.approx(0.1 * 4992 / 12800)


@pytest.mark.parametrize(
    ("kind", "mean"),
    [
        # means over the quarters of the run, by integration: of 1-t, and of (1 + cos πt)/2
        ({"lr_schedule": "polynomial"}, lambda a, b: 1 - (a + b) / 2),
        ({"lr_schedule": "cosine"}, lambda a, b: 0.5 + (math.sin(math.pi * b) - math.sin(math.pi * a)) / (2 * math.pi * (b - a))),
        ({"lr_schedule": "polynomial", "power": 2.0, "end_lr_fraction": 0.1}, lambda a, b: 0.1 + 0.9 * ((1 - a) ** 3 - (1 - b) ** 3) / (3 * (b - a))),
    ],
    ids=["linear", "cosine", "square"],
)  # fmt: skip
def test_an_imported_curve_keeps_its_mean_noise(kind: dict[str, Any], mean: Any) -> None:
    plan = make_plan(policy="import", epochs=100.0, global_batch=128, num_phases=4, max_batch="N/10", **kind)
    first = 0.1 * N / (128 * 0.1)
    expected = [first * mean(k / 4, (k + 1) / 4) for k in range(4)]
    assert [plan.noise_scale(p) for p in plan.schedule.phases] == pytest.approx(expected, rel=1e-5)


def test_an_imported_function_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_schedule")
    module.halves = lambda epoch: 0.5 ** (epoch // 10)  # type: ignore[attr-defined]
    module.rises = lambda epoch: 1 + epoch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_schedule", module)
    made = {"policy": "import", "epochs": 30.0, "global_batch": 128, "num_phases": 3, "max_batch": "N/10"}
    assert batches(**made, lr_schedule="my_schedule:halves") == [128, 256, 512]
    with pytest.raises(JobError, match=r"schedule.lr_schedule: rises from 6 to 16 × lr at epoch 10"):
        phases(**made, lr_schedule="my_schedule:rises")
    with pytest.raises(JobError, match=r"schedule.lr_schedule: my_schedule:nothing: my_schedule does not define it"):
        phases(**made, lr_schedule="my_schedule:nothing")


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (lambda epoch: 1.0 if epoch < 15 else dict[str, float]()["x"], r"my:own\(15.005\) failed: KeyError: 'x'"),
        (lambda epoch: 1.0 if epoch < 15 else None, r"my:own\(15.005\) failed: TypeError: float\(\) argument must be"),
        (lambda epoch: 1 - epoch / 10, r"my:own is -0.5 on average over epochs 10 to 20; must be above 0: no batch"),
        (lambda epoch: 1.0 if epoch < 20 else 0.0, r"my:own is 0 on average over epochs 20 to 30; must be above 0"),
        (lambda epoch: math.inf, r"my:own\(0.005\) is inf"),
        (lambda epoch: math.nan, r"my:own\(0.005\) is nan"),
    ],
    ids=["raises", "no number", "negative", "zero", "infinite", "NaN"],
)
def test_an_imported_function_that_gives_no_learning_rate_is_refused(
    monkeypatch: pytest.MonkeyPatch, function: Any, fault: str
) -> None:
    module = types.ModuleType("my")
    module.own = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my", module)
    with pytest.raises(JobError, match=rf"schedule.lr_schedule: {fault}"):
        phases(policy="import", epochs=30.0, global_batch=128, num_phases=3, max_batch="N/10", lr_schedule="my:own")


def test_a_momentum_for_each_phase_is_made_up_for_by_the_batch() -> None:
    schedule = {**BOUNDARIES, "boundaries_epochs": [60.0], "momenta": [0.9, 0.95], "noise_factor": 1.0}
    plan = make_plan(policy="grow", **schedule)
    before, after = plan.schedule.phases
    assert (after.momentum, after.global_batch, after.lr) == (0.95, 256, 0.1)
    assert plan.noise_scale(after) == pytest.approx(plan.noise_scale(before), rel=1e-12)


def test_warm_up_depends_on_samples_alone() -> None:
    schedule = make_plan(
        policy="grow", warmup_epochs=2.0, warmup_start_lr=0.02, max_batch="N/10", **BOUNDARIES
    ).schedule
    assert schedule.at(0).lr == 0.02
    assert schedule.at(25_088).lr == pytest.approx(0.02 + 0.08 * 25_088 / 100_000)
    assert schedule.at(100_096).lr == 0.1
    assert schedule.at(0).global_batch == 128


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"policy": "grow", **BOUNDARIES}, r'max_batch: is not set, and from epoch 160 the batch would be 16000, above N/10 = 5000; set "N/10"'),
        ({"policy": "grow", "epochs": 9.0, "global_batch": 128, "lr_scale": 50.0}, r"max_batch: is not set, and from epoch 0 the batch would be 6400, above N/10 = 5000"),
        ({"policy": "decay", **BOUNDARIES, "lr_scale": 1000.0}, r"schedule.lr_scale: enlarges the batch of 128 to 128000, above N/10 = 5000"),
        ({"policy": "decay", **BOUNDARIES, "raise_momentum_to": 0.999}, r"schedule.raise_momentum_to: enlarges the batch of 128 to 12800"),
        ({"policy": "grow", **BOUNDARIES, "noise_factor": [2.0, 3.0]}, r"schedule.noise_factor: 2 factors, and boundaries_epochs has 3 epochs"),
        ({"policy": "grow", **BOUNDARIES, "momenta": []}, r"schedule.momenta: needs one for each of the 4 phases"),
        ({"policy": "grow", **BOUNDARIES, "momenta": [0.8, 0.9]}, r"schedule.momenta: needs one for each of the 4 phases, the first 0.9"),
        ({"policy": "grow", **BOUNDARIES, "global_batch": 50_016}, r"global_batch: 50016 must be below N = 50000"),
        ({"policy": "steps", "epochs": 10.0, "batch_steps": "0:768 500:64 400:128"}, r"'0:768 500:64 400:128' must rise, and begins its steps at samples \[0, 500, 400\]"),
        ({"policy": "steps", "epochs": 1.0, "batch_steps": "0:768 50000:1536"}, r"the last step, at 50000 samples, is not before the end of the run at 50000; .* schedule.epochs above 1$"),
        ({"policy": "steps", "epochs": 9.0, "batch_steps": "0:256 900:512", "lr_rule": "adam"}, r"lr_rule: 'adam' is for optim.name = 'adam' or 'adamw', not 'sgd'"),
        ({"optim": ADAM, "policy": "steps", "epochs": 9.0, "batch_steps": "0:256 900:2560", "lr_rule": "adam_linear"}, r"needs κ \(1-β₁\) < 1, but 2560/256 · 0.1 = 1; use 'adam', or grow to at most 2528"),
        ({"optim": {**ADAM, "betas": [0.9, 0.8]}, "policy": "steps", "epochs": 9.0, "batch_steps": "0:256 900:1280", "lr_rule": "adam_linear"}, r"needs κ \(1-β₂\) < 1, but 1280/256 · 0.2 = 1; use 'adam', or grow to at most 1248"),
        ({"optim": ADAM, "policy": "grow", **BOUNDARIES, "momenta": [0.9, 0.9, 0.95, 0.95], "lr_rule": "adam"}, r"schedule.momenta: set β₁ of each phase, and so does"),
        ({"policy": "late", "epochs": 9.0, "global_batch": 128, "max_batch": 128, "hold_fraction": 0.5}, r"max_batch: 128 is 128 samples, not above the first batch of 128: the batch would never grow; use more"),
        ({"policy": "late", "epochs": 9.0, "global_batch": 128, "max_batch": 512}, r"schedule.hold_fraction: is required"),
        ({"policy": "late", "epochs": 9.0, "global_batch": 128, "max_batch": 512, "hold_fraction": 1.0}, r"schedule.hold_fraction: must be less than 1, got 1.0"),
        ({"policy": "seesaw", **BOUNDARIES, "max_batch": 5120}, r"schedule.policy: 'seesaw' is for optim.name = 'adam' or 'adamw', not 'sgd'; use 'grow'"),
        ({"optim": {**SGD, "name": "lars"}, "policy": "seesaw", **BOUNDARIES}, r"schedule.policy: 'seesaw' is for .*, not 'lars'"),
        ({"optim": ADAM, "policy": "seesaw", **BOUNDARIES, "exact_noise": True}, r"schedule.exact_noise: is for plain gradients, but 'seesaw' uses"),
        ({"policy": "steps", "epochs": 9.0, "batch_steps": "0:256 900:512", "lr_scale": 2.0}, r"schedule.lr_scale: starts with a larger batch, but batch_steps sets every batch; change optim.lr"),
        ({"policy": "steps", "epochs": 9.0, "batch_steps": "0:256 900:512", "raise_momentum_to": 0.95}, r"schedule.raise_momentum_to: .*; change optim.momentum"),
        ({"policy": "decay", **BOUNDARIES, "raise_momentum_to": 0.5}, r"schedule.raise_momentum_to: 0.5 is below optim.momentum = 0.9; remove it"),
        ({"policy": "adabatch", "epochs": 90.0, "every_epochs": 1e-3, "global_batch": 128}, r"every_epochs: 90 epochs by 0.001 are 90000 phases, at most 1000"),
        ({"policy": "adabatch", "epochs": 900.0, "every_epochs": 1.0, "global_batch": 128, "batch_factor": 99.0}, r"leave the range of floating point|above N/10"),
        ({"policy": "steps", "epochs": 9.0, "batch_steps": "0:0"}, r"schedule.batch_steps: a batch must be at least 1, got 0; nearest: 32"),
        ({"policy": "steps", "epochs": 9.0, "batch_steps": "0:128 5:0"}, r"schedule.batch_steps: a batch must be at least 1, got 0; nearest: 32"),
        ({"policy": "steps", "epochs": 9.0, "batch_steps": "0:128 500:50016"}, r"schedule.batch_steps: 50016 must be below N = 50000: .*; nearest: 49984"),
        ({"policy": "grow", **BOUNDARIES, "max_batch": 64_000}, r"schedule.max_batch: 64000 must be below N = 50000: .*; nearest: 49984"),
        ({"policy": "import", "epochs": 9.0, "global_batch": 128, "lr_schedule": "steps"}, r"lr_steps: belongs to lr_schedule = 'steps', which needs it"),
        ({"policy": "import", "epochs": 9.0, "global_batch": 128, "lr_schedule": "cosine", "lr_steps": [[1.0, 0.5]]}, r"lr_steps: belongs to lr_schedule = 'steps'"),
        ({"policy": "import", "epochs": 9.0, "global_batch": 128, "lr_schedule": "steps", "lr_steps": [[9.0, 0.5]]}, r"lr_steps: its epochs must rise from above 0 to below epochs = 9, got \[9.0\]"),
        ({"policy": "decay", **BOUNDARIES, "warmup_epochs": 200.0}, r"schedule.warmup_epochs: 200 must be below epochs = 200"),
        ({"policy": "decay", **BOUNDARIES, "warmup_epochs": 1.0, "warmup_start_lr": 0.2}, r"warmup_start_lr: 0.2 is above the learning rate 0.1"),
        ({"policy": "decay", **BOUNDARIES, "warmup_start_lr": 0.02}, r"schedule.warmup_start_lr: 0.02 has no effect: warmup_epochs is 0; set it"),
        ({"policy": "hybrid", **BOUNDARIES, "growing_boundaries": 9}, r"growing_boundaries: 9 of 3 boundaries; nearest: 3, which is policy = 'grow'"),
        ({"policy": "import", "epochs": 9.0, "global_batch": 128, "lr_schedule": "cosine", "power": 2.0}, r"schedule.power: is for 'polynomial', not 'cosine'; remove it"),
        ({"policy": "import", "epochs": 9.0, "global_batch": 128, "lr_schedule": "steps", "lr_steps": [[1.0, 0.5]], "num_phases": 3, "end_lr_fraction": 0.1}, r"end_lr_fraction: is for 'polynomial' or 'cosine', not 'steps'; remove it\n  schedule.num_phases: is for 'polynomial' or 'cosine' or 'module:function', not"),
        ({"policy": "decay", **BOUNDARIES, "layout": {"max_ranks": 8}}, r"layout.max_ranks: is for grow_by = 'ranks' or 'auto', not 'accumulation'; remove it"),
        ({"policy": "decay", **BOUNDARIES, "layout": {"ranks_per_phase": [1, 1, 1, 1]}}, r"layout.ranks_per_phase: is for grow_by = 'ranks', not"),
        ({"policy": "decay", **BOUNDARIES, "layout": {"grow_by": "ranks", "objective": "least_rank_hours", "time_limit_h": 1.0}}, r"layout.objective: is for grow_by = 'auto', not 'ranks'; remove it\n  layout.time_limit_h"),
        ({"policy": "decay", **BOUNDARIES, "layout": {"grow_by": "ranks", "ranks_per_phase": [1, 1, 1, 1], "max_ranks": 2}}, r"layout.max_ranks: is for grow_by = 'ranks' or 'auto' without ranks_per_phase; remove it"),
        ({"policy": "decay", **BOUNDARIES, "layout": {"grow_by": "auto"}}, r"layout.grow_by: 'auto' needs costs: --cost"),
        ({"policy": "decay", **BOUNDARIES, "layout": {"grow_by": "ranks", "ranks_per_phase": [1]}}, r"ranks_per_phase: 1 numbers for 4 phases"),
        ({"policy": "decay", **BOUNDARIES, "layout": {"max_micro_batch": 100}}, r"layout.max_micro_batch: 100 = 3.12 ghost batches of 32, which are never cut; nearest: 96, 128"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_with_the_arithmetic(job: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        make_plan(**job)


def test_all_faults_of_a_plan_are_reported_at_once() -> None:
    with pytest.raises(JobError) as caught:
        make_plan(ranks=3, policy="grow", warmup_epochs=300.0, **{**BOUNDARIES, "boundaries_epochs": [60.0, 50.0]})
    paths = {fault.path for fault in caught.value.faults}
    assert {"schedule.boundaries_epochs", "schedule.warmup_epochs"} < paths
    assert any(path.startswith("phase 1") for path in paths)


@pytest.mark.parametrize(("policy", "optim"), [("grow", SGD), ("seesaw", ADAM)])
def test_lists_of_a_wrong_length_are_reported_together(policy: str, optim: dict[str, Any]) -> None:
    with pytest.raises(JobError) as caught:
        make_plan(optim=optim, policy=policy, **{**BOUNDARIES, "noise_factor": [5.0, 3.0], "momenta": [0.9, 0.95]})
    assert [fault.path for fault in caught.value.faults] == ["schedule.noise_factor", "schedule.momenta"]


def test_a_value_that_cuts_ghost_batches_is_reported_at_its_key_and_hides_no_phase() -> None:
    schedule = {**BOUNDARIES, "boundaries_epochs": [60.0, 120.0], "max_batch": 5000, "noise_factor": 50.0}
    with pytest.raises(JobError) as caught:
        make_plan(ranks=8, policy="grow", layout={"max_micro_batch": 12}, **schedule)
    assert [str(fault) for fault in caught.value.faults] == [
        "layout.max_micro_batch: 12 = 0.38 ghost batches of 32, which are never cut; nearest: 32",
        "schedule.max_batch: 5000 = 156.25 ghost batches of 32, which are never cut; nearest: 4992, 5024",
        "phase 1 (from epoch 0): global batch 128 = 4 ghost batches of 32 for 8 ranks: 4 would have nothing to do; "
        "nearest: 256, or 4 ranks",
    ]
    with pytest.raises(JobError, match=r"1 fault\n  schedule.batch_steps: 200 = 6.25 ghost batches of 32"):
        make_plan(policy="steps", epochs=9.0, batch_steps="0:128 500:200 900:256")
    with pytest.raises(JobError, match=r"1 fault\n  schedule.global_batch: 80 = 2.50 ghost batches of 32"):
        make_plan(policy="decay", epochs=9.0, global_batch=80, lr_scale=2.0)


def test_growth_by_ranks_gives_each_a_full_micro_batch() -> None:
    layout = {"grow_by": "ranks", "max_micro_batch": 128, "max_ranks": 16}
    plan = make_plan(ranks=64, policy="grow", max_batch=5120, layout=layout, **BOUNDARIES)
    shapes = [(made.ranks, made.accumulation, made.micro_batch) for made in plan.layouts]
    # 128 → 1 rank; 640 = 5 × 128; 3 200 = 100 groups of 32, of which 10 is the largest divisor up to 16: 10 groups
    # a rank, 2 a pass (4 do not divide 10); 5 120 = 160 groups on 16 ranks: 10 again
    assert shapes == [(1, 1, 128), (5, 1, 128), (10, 5, 64), (16, 5, 64)]
    assert plan.peak_ranks == 16
    for made, phase in zip(plan.layouts, plan.schedule.phases, strict=True):
        assert made.ranks * made.accumulation * made.micro_batch == phase.global_batch


def test_a_phase_that_loses_ranks_is_noted_with_the_batches_that_would_not() -> None:
    """The defect: 5 056 = 79 · 64 ghost batches, a prime, went to 1 rank after 5 without a word."""
    layout = {"grow_by": "ranks", "max_micro_batch": 64}
    plan = make_plan(ranks=8, policy="grow", max_batch=79 * 32, layout=layout, **BOUNDARIES)
    # 4 · 32, 20 · 32 and 79 · 32, two ghost batches a pass
    assert [made.ranks for made in plan.layouts] == [2, 5, 1, 1]
    note = "phase 3 has 1 rank, the one before has 5: batch 2528 = 79 ghost batches of 32; nearest for 5 ranks: "
    assert plan.notes == [f"{note}2400, 2560; or layout.uneven_ranks = true"]
    assert plan.to_dict()["notes"] == plan.notes
    uneven = make_plan(ranks=8, policy="grow", max_batch=79 * 32, layout={**layout, "uneven_ranks": True}, **BOUNDARIES)
    assert ([made.ranks for made in uneven.layouts], uneven.notes) == ([2, 8, 8, 8], [])
    falling = make_plan(ranks=8, policy="steps", epochs=9.0, batch_steps="0:512 50000:128", layout=layout)
    assert ([made.ranks for made in falling.layouts], falling.notes) == ([8, 2], [])


def test_no_more_ranks_are_planned_than_are_available() -> None:
    """The defect: max_ranks was taken for ranks that are there, and `train` refused what `plan` had shown."""
    layout = {"grow_by": "ranks", "max_micro_batch": 64, "max_ranks": 8}
    plan = make_plan(ranks=2, policy="grow", max_batch=640, layout=layout, **BOUNDARIES)
    assert plan.peak_ranks == 2
    assert plan.notes == ["layout.max_ranks = 8, but the run has 2 ranks (--ranks)"]


def test_stated_ranks_above_the_available_ones_are_noted() -> None:
    layout = {"grow_by": "ranks", "ranks_per_phase": [1, 1, 2, 4]}
    notes = {
        ranks: make_plan(ranks=ranks, policy="grow", max_batch=640, layout=layout, **BOUNDARIES).notes
        for ranks in (1, 2, 4)
    }
    needs = "layout.ranks_per_phase needs 4, but the run has"
    assert notes == {1: [f"{needs} 1 rank (--ranks)"], 2: [f"{needs} 2 ranks (--ranks)"], 4: []}


def test_ranks_of_a_phase_without_updates_are_not_needed() -> None:
    """Updates of 512 from sample 65,536 end at 98,304, after the last boundary, so the largest batch is never used."""
    layout = {"grow_by": "ranks", "ranks_per_phase": [2, 8, 32]}
    plan = make_plan(ranks=8, policy="steps", epochs=1.965, batch_steps="0:512 65536:32768 98000:40960", layout=layout)
    assert [phase.num_updates for phase in plan.schedule.phases] == [128, 1, 0]
    assert (plan.peak_ranks, plan.notes) == (8, [])


def test_stated_ranks_are_used() -> None:
    layout = {"grow_by": "ranks", "ranks_per_phase": [1, 2, 4, 8]}
    plan = make_plan(policy="grow", max_batch=5120, layout=layout, **BOUNDARIES)
    assert [made.ranks for made in plan.layouts] == [1, 2, 4, 8]


@pytest.mark.parametrize(("num_samples", "ranks", "batch"), [(10**9, 1, 8192), (1_281_167, 10_000, 320_000)])
def test_large_machines_and_data_are_planned(num_samples: int, ranks: int, batch: int) -> None:
    schedule = {**BOUNDARIES, "global_batch": batch, "max_batch": 4 * batch}
    job = make_job(policy="grow", **schedule)
    plan = compile_plan(job, ranks, num_samples)
    assert plan.schedule.end_samples >= 200 * num_samples


# --- the twin ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        {"policy": "adabatch", "epochs": 90.0, "every_epochs": 20.0, "global_batch": 128, "max_batch": "N/10"},
        {"policy": "steps", "epochs": 10.0, "batch_steps": "0:768 250000:1536"},
        {"policy": "import", "epochs": 90.0, "global_batch": 128, "lr_schedule": "cosine", "max_batch": "N/10"},
        {"policy": "import", "epochs": 90.0, "global_batch": 128, "lr_schedule": "cosine", "num_phases": 1},
        {"policy": "import", "epochs": 9.0, "global_batch": 128, "lr_schedule": "polynomial", "lr_scale": 3.0, "max_batch": "N/10"},
    ],
)  # fmt: skip
def test_the_twin_of_any_policy_has_its_noise(job: dict[str, Any]) -> None:
    plan = make_plan(**job)
    twin = compile_twin(decay_twin(plan.job, N), 1, N)
    assert [twin.noise_scale(p) for p in twin.schedule.phases] == pytest.approx(
        [plan.noise_scale(p) for p in plan.schedule.phases], rel=1e-9
    )


def test_the_twin_of_a_larger_start_warms_up_at_its_noise() -> None:
    schedule = {**BOUNDARIES, "warmup_epochs": 2.0, "warmup_start_lr": 0.1, "lr_scale": 5.0, "max_batch": "N/10"}
    plan = make_plan(policy="grow", **schedule)
    twin = compile_twin(decay_twin(plan.job, N), 1, N)
    for samples in (0, 64_000):  # 100 updates of 640, and 500 of 128
        assert twin.noise_scale(twin.schedule.at(samples)) == pytest.approx(plan.noise_scale(plan.schedule.at(samples)))


@pytest.mark.parametrize(
    "job",
    [
        {"policy": "grow", **BOUNDARIES, "boundaries_epochs": [1.0, 2.0], "max_batch": 640},
        {"policy": "import", "epochs": 9.0, "global_batch": 128, "lr_schedule": "polynomial", "max_batch": "N/10"},
    ],
)
def test_a_warm_up_beyond_a_boundary_lowers_the_noise_of_job_and_twin_alike(job: dict[str, Any]) -> None:
    """The defect: both rose from the same learning rate, at batches that were not the same any more."""
    plan = make_plan(warmup_epochs=4.0, warmup_start_lr=0.02, **job)
    twin = compile_twin(decay_twin(plan.job, N), 1, N)
    first = plan.schedule.phases[0]
    assert plan.schedule.at(0).lr == 0.02
    for phase in plan.schedule.phases:
        # Of the noise without a warm-up, the share that rises from 0.02 / ε at sample 0 to 1 at 4 N.
        at, share = phase.start_samples, 0.02 / first.lr
        expected = plan.noise_scale(phase) * min(1.0, share + (1 - share) * at / (4 * N))
        assert plan.noise_scale(plan.schedule.at(at)) == pytest.approx(expected, rel=1e-9)
        decayed = next(p for p in twin.schedule.phases if p.start_epoch == phase.start_epoch)
        assert twin.start.noise.of(twin.schedule.warmup.lr_at(at, decayed.lr), 0.9, 128) == pytest.approx(
            expected, rel=1e-9
        )


# --- transitions -----------------------------------------------------------------------------


def test_transitions_say_what_happens_to_momentum_norm_and_decay() -> None:
    optim = {**SGD, "weight_decay": 5e-4, "rescale_momentum": True}
    schedule = {**BOUNDARIES, "boundaries_epochs": [60.0], "momenta": [0.9, 0.95]}
    (line,) = describe_transitions(make_plan(optim=optim, policy="grow", max_batch=640, **schedule))
    # 128 · 5 · 2 = 1 280 wanted; weight decay per epoch λ ε N/(B (1-m)) = λ g
    assert "batch × 5 (requested 1,280, formed 640: lr makes up for it); lr ÷ 2;" in line
    assert "momentum 0.9 → 0.95, buffer × 2;" in line
    assert "BN memory 320 samples = 2.5 → 0.5 updates" in line
    assert "weight decay per epoch 0.195 → 0.0391" in line
    (line,) = describe_transitions(make_plan(policy="grow", max_batch=640, **schedule))
    assert re.search(r"buffer refills over B/\(N\(1-m\)\) = 0.26 epochs; .*; no weight decay", line)
    without = BOUNDARIES | {"boundaries_epochs": [60.0], "momenta": [0.9, 0.0], "noise_factor": 1.0}
    (line,) = describe_transitions(make_plan(optim=optim, policy="decay", **without))
    assert "momentum 0.9 → 0, buffer cleared;" in line
    filling = without | {"momenta": [0.0, 0.9]}  # without momentum there is no buffer to multiply
    (line,) = describe_transitions(make_plan(optim=optim | {"momentum": 0.0}, policy="decay", **filling))
    assert "momentum 0 → 0.9, buffer refills over" in line
