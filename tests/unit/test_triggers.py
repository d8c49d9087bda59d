"""Triggers: Plateau is torch's rule on epochs, the others give the batch that their formulas give, none runs ahead."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.trigger import TRIGGERS, Measurement, bounded, make_trigger
from hvd_batchgrow.schedule.triggers.adascale import AdaScale
from hvd_batchgrow.schedule.triggers.cabs import CabsTrigger
from hvd_batchgrow.schedule.triggers.formula import FormulaRule, FormulaTrigger
from hvd_batchgrow.schedule.triggers.plateau import Plateau, PlateauTrigger
from hvd_batchgrow.train.update.gradient_noise import GradientNoiseScale, NoiseAverage, estimate
from tests.helpers import NUM_TRAIN, measured_job, measured_tree

N = 1000


def section(**values: Any) -> Any:
    return TRIGGERS[values["name"]].section.model_validate(values)


def decision_at(samples: int) -> Decision:
    return Decision(samples, "planted", "", 128, 256, 256.0, 0.1, 0.1)


# --- plateau ----------------------------------------------------------------------------------------


def torchs_decisions(
    metrics: list[float], mode: Any, threshold: float, patience: int, cooldown: int
) -> tuple[list[int], float]:
    """Calls at which ReduceLROnPlateau divides the learning rate, from 0; and its best metric."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode=mode,
        factor=0.999,
        patience=patience,
        cooldown=cooldown,
        threshold=threshold,
        threshold_mode="abs",
        eps=0.0,
    )
    found = []
    for call, metric in enumerate(metrics):
        before = optimizer.param_groups[0]["lr"]
        rule.step(metric)
        if optimizer.param_groups[0]["lr"] < before:
            found.append(call)
    return found, float(rule.best)


def our_decisions(
    metrics: list[float], trigger: PlateauTrigger, every: float, late: list[int], *, through_checkpoints: bool
) -> tuple[list[int], Plateau]:
    """The same, with evaluations some samples after they are due, as updates have it."""
    rule, found = Plateau(trigger, N, every, improves_up=trigger.metric == "top1"), []
    for call, metric in enumerate(metrics):
        if through_checkpoints:
            again = Plateau(trigger, N, every, improves_up=trigger.metric == "top1")
            again.load(rule.state.model_dump())
            rule = again
        samples = math.ceil((call + 1) * every * N - 1e-6) + late[call]
        request = rule.look(Measurement(samples, 16, 0.1, metric=metric))
        assert rule.look(Measurement(samples + 1, 16, 0.1)) is None  # no evaluation, no news
        if request:
            assert request.noise_factor == trigger.noise_factor
            rule.decided(decision_at(samples))
            found.append(call)
    return found, rule


@pytest.mark.parametrize("metric", ["loss", "top1"])
@pytest.mark.parametrize("every", [1.0, 0.5, 0.1, 0.3])
def test_plateau_is_torchs_rule(metric: str, every: float) -> None:
    draw = random.Random(f"{metric} {every}")  # noqa: S311
    num_decisions = 0
    for case in range(100):
        patience, cooldown = draw.randint(0, 4), draw.randint(0, 5)
        threshold = draw.choice([0.0, 0.05, 0.5])
        # In twentieths, so that gains of just the threshold come up.
        metrics = [round(draw.randint(0, 40) / 20, 2) for _ in range(40)]
        trigger = section(
            name="plateau",
            metric=metric,
            min_delta=threshold,
            patience_epochs=patience * every,
            cooldown_epochs=cooldown * every,
        )
        late = [draw.randint(0, int(every * N) - 1) for _ in metrics]
        theirs, best = torchs_decisions(metrics, {"loss": "min", "top1": "max"}[metric], threshold, patience, cooldown)
        ours, rule = our_decisions(metrics, trigger, every, late, through_checkpoints=case % 2 == 1)
        assert ours == theirs, (patience, cooldown, threshold, metrics)
        assert rule.state.best == best
        num_decisions += len(ours)
    assert num_decisions > 200


@pytest.mark.parametrize("every", [1.0, 0.5])
def test_an_unusable_evaluation_is_as_if_torchs_rule_had_not_been_called(every: float) -> None:
    draw = random.Random(every)  # noqa: S311
    num_decisions = 0
    for _ in range(100):
        patience, cooldown = draw.randint(0, 3), draw.randint(0, 3)
        metrics = [None if draw.random() < 0.3 else draw.randint(0, 40) / 20 for _ in range(40)]
        usable = [call for call, metric in enumerate(metrics) if metric is not None]
        theirs, _ = torchs_decisions([m for m in metrics if m is not None], "min", 0.05, patience, cooldown)
        trigger = section(
            name="plateau", min_delta=0.05, patience_epochs=patience * every, cooldown_epochs=cooldown * every
        )
        rule, ours = Plateau(trigger, N, every, improves_up=trigger.metric == "top1"), []
        for call, metric in enumerate(metrics):
            again = Plateau(trigger, N, every, improves_up=trigger.metric == "top1")
            again.load(rule.state.model_dump())
            rule, samples = again, round((call + 1) * every * N)
            if rule.look(Measurement(samples, 16, 0.1, metric=metric, was_unusable=metric is None)):
                rule.decided(decision_at(samples))
                ours.append(call)
        assert ours == [usable[k] for k in theirs]
        num_decisions += len(ours)
    assert num_decisions > 100


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["norm_test", "cabs", "similarity", "gradient_noise", "adascale"])
def test_no_trigger_decides_by_a_measurement_that_is_not_finite(name: str, value: float) -> None:
    schedule = {"batch_scale": 4.0, "batch_multiple": 8} if name == "adascale" else {}
    job = measured_job({"name": name}, schedule=schedule)
    for trace, norm in ((value, 0.5), (9600.0, value), (value, value)):
        request = make_trigger(job, NUM_TRAIN).look(Measurement(0, 32, 0.1, trace, norm, 2.0))
        if name == "cabs" and trace == 9600.0:  # its formula has no norm: ε tr(Σ)/loss = 480, and at most 2 × 32
            assert request is not None
            assert request.batch == 64.0
        else:
            assert request is None, (trace, norm)
    if name == "cabs":
        assert make_trigger(job, NUM_TRAIN).look(Measurement(0, 32, 0.1, 9600.0, 0.5, value)) is None


def test_the_best_evaluation_is_known_by_its_sample_counter() -> None:
    rule = Plateau(section(name="plateau", metric="top1"), N, 1.0, improves_up=True)
    for samples, metric in ((1000, 0.5), (2016, 0.7), (3008, 0.7), (4000, 0.6)):
        rule.look(Measurement(samples, 16, 0.1, metric=metric))
    assert rule.best_samples == 2016


# --- what formulas give -----------------------------------------------------------------------------


def seen(trace: float | None, norm: float | None, batch: int = 32, lr: float = 0.1, loss: float = 2.0) -> Measurement:
    return Measurement(0, batch, lr, trace, norm, loss)


def request_of(now: Measurement, **trigger: Any) -> BatchRequest | None:
    """Without a limit on how far, nor on how little, and at once."""
    free = {"max_batch_factor": 1e9, "min_factor": 1.0}
    hold = {"hold_epochs": 0.0} if trigger["name"] == "gradient_noise" else {}
    job = measured_job(free | hold | trigger)
    return make_trigger(job, NUM_TRAIN).look(now)


def batch_of(now: Measurement, **trigger: Any) -> float | None:
    request = request_of(now, **trigger)
    return request.batch if request else None


def test_the_norm_test_gives_its_formula() -> None:
    # |g|² of a batch of 32 is 0.5 + 64/32 = 2.5; tr(Σ)/B = 2 is above θ² |g|² = 0.625: ⌈64/0.625⌉
    assert batch_of(seen(64.0, 0.5), name="norm_test", theta=0.5) == 103
    # B₁ where it just holds: tr(Σ)/B = θ² |g|²
    assert batch_of(seen(64.0, 4.0), name="norm_test", theta=math.sqrt(1 / 3)) is None
    assert batch_of(seen(64.0, 3.9), name="norm_test", theta=math.sqrt(1 / 3)) == math.ceil(64 * 3 / 5.9)


def test_cabs_gives_its_formula_with_the_rate_of_now() -> None:
    assert batch_of(seen(9600.0, 1.0, lr=0.1, loss=2.0), name="cabs", scale=1.5) == pytest.approx(1.5 * 0.1 * 9600 / 2)
    assert batch_of(seen(9600.0, 1.0, loss=2.0), name="cabs", loss_offset=-1.5) == pytest.approx(0.1 * 9600 / 0.5)
    assert batch_of(seen(9600.0, 1.0, loss=2.0), name="cabs", loss_offset=-2.0) is None
    found = CabsTrigger(name="cabs", loss_offset=-1.5).formula(seen(9600.0, 1.0, loss=2.0))
    assert found is not None
    assert found[1] == "CABS: c ε tr(Σ)/(loss + δ) = 1 · 0.1 · 9.6e+03/0.5"
    assert batch_of(seen(9600.0, 1.0, lr=0.005), name="cabs") is None  # 24, below the batch
    # The formula does not use the norm, so it need not be resolved.
    assert batch_of(seen(9600.0, -1.0), name="cabs") == pytest.approx(480.0)


def test_similarity_gives_the_batch_at_which_the_expected_cosine_is_as_wanted() -> None:
    wanted = batch_of(seen(640.0, 2.0), name="similarity", similarity=0.8)
    assert wanted is not None
    assert 1 / (1 + 320.0 / wanted) == pytest.approx(0.8)
    assert batch_of(seen(640.0, 2.0), name="similarity", similarity=1 / 12) is None


def test_gradient_noise_gives_b_simple_over_h() -> None:
    assert batch_of(seen(640.0, 2.0), name="gradient_noise", ratio=4.0) == pytest.approx(80.0)
    assert batch_of(seen(640.0, 2.0), name="gradient_noise", ratio=10.0) is None


GRADIENT_TRIGGERS = ("norm_test", "similarity", "gradient_noise")


@pytest.mark.parametrize("name", [*GRADIENT_TRIGGERS, "cabs"])
@pytest.mark.parametrize(("trace", "norm"), [(None, None), (640.0, 0.0), (640.0, -3.0), (-1.0, 2.0), (0.0, 2.0)])
def test_what_is_not_resolved_never_grows_a_batch(name: str, trace: float | None, norm: float | None) -> None:
    if name == "cabs" and trace == 640.0:
        norm = None  # of which it takes no notice
        assert request_of(replace(seen(trace, norm), loss=None), name=name) is None
    else:
        assert request_of(seen(trace, norm), name=name) is None


def test_the_gain_of_adascale_follows_every_decision() -> None:
    rule = AdaScale(section(name="adascale"), base_batch=16)
    for old_lr, new_lr in ((0.1, 0.2), (0.2, 0.3)):
        rule.decided(replace(decision_at(0), old_lr=old_lr, new_lr=new_lr))
    assert rule.state.gain == pytest.approx(3.0)


# --- a problem whose noise is known -----------------------------------------------------------------


class Quadratic:
    """Losses ½ (w - x)ᵀ H (w - x) of samples x ~ N(0, I): a sample's gradient is H (w - x)."""

    def __init__(self, dims: int = 10) -> None:
        self.curvature = np.linspace(0.5, 2.0, dims)
        self.weights = np.full(dims, 0.6)
        self.draw = np.random.default_rng(0)
        self.trace = float((self.curvature**2).sum())
        self.squared_norm = float(((self.curvature * self.weights) ** 2).sum())

    def measured(self, num_updates: int, num_micro_batches: int = 4, micro_batch: int = 8) -> GradientNoiseScale:
        average, batch = NoiseAverage(1e9), num_micro_batches * micro_batch
        for _ in range(num_updates):
            x = self.draw.standard_normal((num_micro_batches, micro_batch, len(self.weights)))
            passes = (self.curvature * (self.weights - x)).mean(1)
            mean = passes.mean(0)
            weighted = float(micro_batch * (passes**2).sum())
            one = estimate(weighted, num_micro_batches, batch, float(mean @ mean))
            assert one is not None
            average.add(one, batch)
        assert average.value is not None
        return average.value


def test_the_noise_of_a_quadratic_problem_is_found_within_its_band_and_triggers_follow_it() -> None:
    problem = Quadratic()
    value, truth = problem.measured(600), problem.trace / problem.squared_norm
    assert value.low is not None
    assert value.high is not None
    assert value.b_simple is not None
    assert value.low < truth < value.high
    assert value.high - value.low < 0.4 * truth
    now = Measurement(0, 1, 0.1, value.trace, value.squared_norm, loss=0.5)
    low, high = value.low, value.high
    asked = {name: batch_of(now, name=name) for name in (*GRADIENT_TRIGGERS, "cabs")}
    assert asked["gradient_noise"] == value.b_simple
    assert asked["similarity"] is not None
    assert low < asked["similarity"] < high  # s = 0.5: B_simple itself
    # |g|² of one sample is |G|² + tr(Σ): ⌈B_simple / (θ² (1 + B_simple))⌉ with θ = 0.5
    assert asked["norm_test"] == math.ceil(4 * value.b_simple / (1 + value.b_simple))
    assert asked["cabs"] == pytest.approx(0.1 * value.trace / 0.5, rel=1e-12)
    # Ŝ of an update has the variance 2 Σ h⁴/3, for k - 1 = 3. The mean of 600 is within 4 standard errors.
    error = math.sqrt(2 * float((problem.curvature**4).sum()) / 3 / 600)
    assert value.trace == pytest.approx(problem.trace, abs=4 * error)


# --- when -------------------------------------------------------------------------------------------


class Planted(FormulaTrigger):
    """Gives the batch that the test chooses."""

    wanted: float

    def formula(self, now: Measurement) -> tuple[float, str]:
        return self.wanted, "planted"


def test_a_request_lies_between_min_factor_and_factor_of_the_batch() -> None:
    asked = [(33.0, None), (47.9, None), (48.1, 48.1), (95.0, 95.0), (500.0, 96.0)]
    for wanted, expected in asked:
        trigger = Planted(name="planted", max_batch_factor=3.0, min_factor=1.5, wanted=wanted)
        request = FormulaRule(trigger).look(seen(None, None))
        assert (request.batch if request else None) == expected


def test_it_must_ask_all_the_time_for_as_long_as_the_hold() -> None:
    rule = make_trigger(measured_job({"name": "gradient_noise", "hold_epochs": 0.5, "max_batch_factor": 2.0}), N)
    high, low = (640.0, 1.0), (10.0, 1.0)

    def ask(samples: int, trace_and_norm: tuple[float, float]) -> bool:
        return rule.look(replace(seen(*trace_and_norm), samples=samples)) is not None

    assert [ask(s, high) for s in (100, 400, 599, 600, 601)] == [False, False, False, True, True]
    assert not ask(650, low)  # the holding time starts again here
    assert [ask(s, high) for s in (700, 1100, 1199, 1200)] == [False, False, False, True]
    assert not ask(1250, (640.0, -1.0))  # unresolved: it does not ask
    assert [ask(s, high) for s in (1300, 1799, 1800)] == [False, False, True]
    rule.decided(decision_at(1800))
    assert [ask(s, high) for s in (1801, 2300, 2301)] == [False, False, True]
    again = make_trigger(measured_job({"name": "gradient_noise", "hold_epochs": 0.5, "max_batch_factor": 2.0}), N)
    rule.decided(decision_at(2301))
    ask(2400, high)
    again.load(rule.state.model_dump())
    for one in (rule, again):
        assert one.look(replace(seen(*high), samples=2899)) is None
        assert one.look(replace(seen(*high), samples=2900)) is not None


def windows_job(name: str = "norm_test", **trigger: Any) -> Job:
    return measured_job({"name": name, "windows_epochs": [[2.0, 4.0], [5.0, 6.0]], **trigger})


@pytest.mark.parametrize(
    ("epoch", "num_decisions", "requests", "expected"),
    [
        (1.99, 0, True, "nothing"),
        (2.0, 0, True, "request"),
        (2.0, 0, False, "nothing"),
        (3.99, 0, False, "nothing"),
        (4.0, 0, False, "forced"),
        (4.2, 0, False, "forced"),
        (4.0, 0, True, "request"),
        (4.99, 1, True, "nothing"),
        (5.0, 1, True, "request"),
        (6.0, 1, False, "forced"),
        (6.0, 2, True, "nothing"),
        (9.0, 2, False, "nothing"),
    ],
)
def test_windows_bound_decisions(epoch: float, num_decisions: int, requests: bool, expected: str) -> None:
    now = Measurement(round(epoch * N), 32, 0.1)
    request = BatchRequest("planted", batch=40.0) if requests else None
    found = bounded(request, windows_job(max_batch_factor=3.0), N, num_decisions, now)
    if expected == "request":
        assert found == request
    elif expected == "nothing":
        assert found is None
    else:
        assert found is not None
        assert found.batch == 96.0
        assert found.why.startswith("the window of")
        assert found.why.endswith("epochs ends")


def test_a_plateaus_window_ends_by_its_factor_of_the_noise() -> None:
    found = bounded(None, windows_job("plateau", noise_factor=4.0), N, 0, Measurement(4000, 32, 0.1))
    assert found is not None
    assert (found.noise_factor, found.batch) == (4.0, None)


@pytest.mark.parametrize(
    ("trigger", "first"),
    [
        ({"name": "cabs", "first_decision_epoch": 0.0}, 0.0),
        ({"name": "cabs", "first_decision_epoch": None}, 1.5),  # half of three epochs
        ({"name": "gradient_noise", "first_decision_epoch": 2.25}, 2.25),
        ({"name": "plateau"}, 0.0),
        ({"name": "plateau", "first_decision_epoch": 0.5}, 0.5),
    ],
)
def test_no_decision_comes_before_the_first_epoch_that_allows_one(trigger: dict[str, Any], first: float) -> None:
    trigger = {key: value for key, value in trigger.items() if value is not None}
    job = parse_job({**measured_tree("data", trigger), "trigger": trigger})
    request = BatchRequest("planted", batch=40.0)

    def found(samples: int) -> bool:
        return bounded(request, job, N, 50, Measurement(samples, 32, 0.1)) == request

    edge = round(first * N)
    assert found(edge)
    assert found(edge + 5)
    assert not (edge and found(edge - 1))


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        ({"first_decision_epoch": 3.0}, "3 is not before schedule.epochs = 3, so the trigger would never decide"),
        ({"first_decision_epoch": 1.0, "windows_epochs": [[1.0, 2.0]]}, "1 conflicts with windows_epochs, which sets"),
    ],
)
def test_a_first_epoch_that_has_no_effect_is_refused(trigger: dict[str, Any], message: str) -> None:
    job = measured_job({"name": "norm_test", **trigger})
    with pytest.raises(JobError, match=f"trigger.first_decision_epoch: {message}"):
        compile_plan(job, 1, N)


def test_cabs_follows_the_rate_through_the_warm_up() -> None:
    schedule = {"warmup_epochs": 2.0, "warmup_start_lr": 0.01}
    job = measured_job({"name": "cabs", "max_batch_factor": 100.0, "min_factor": 1.0}, schedule=schedule)
    plan = compile_plan(job, 1, NUM_TRAIN)
    for samples in (0, 160, 320, 608):
        lr = plan.schedule.at(samples).lr
        assert lr == pytest.approx(0.01 + 0.04 * min(1.0, samples / 600))
        request = make_trigger(job, NUM_TRAIN).look(Measurement(samples, 16, lr, 4000.0, 1.0, 0.5))
        assert request is not None
        assert request.batch == pytest.approx(lr * 8000)


def test_known_values_are_recorded() -> None:
    assert Measurement(5, 32, 0.1).numbers() == {"global_batch": 32, "lr": 0.1}
    numbers = Measurement(5, 32, 0.1, 640.0, 2.0, 0.5, 0.25).numbers()
    assert numbers["b_simple"] == 320.0
    assert (numbers["trace"], numbers["squared_norm"], numbers["loss"], numbers["metric"]) == (640.0, 2.0, 0.5, 0.25)
