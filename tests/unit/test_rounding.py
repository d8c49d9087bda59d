"""Ties are decided by a rule, up, and not by the last digit of a float. Expected values are worked out in fractions."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.policies.imported import cosine_mean, polynomial_mean
from hvd_batchgrow.schedule.rounding import half_up, period_ends, periods_done, samples_at, whole_multiples
from hvd_batchgrow.schedule.trigger import Measurement
from hvd_batchgrow.schedule.triggers.plateau import Plateau
from tests.helpers import NUM_TRAIN, measured_job
from tests.unit.test_triggers import section


def plan_of(num_samples: int, group: int, momentum: float = 0.9, **schedule: Any) -> Plan:
    tree = {
        "name": "ties",
        "data": {"source": "synthetic_images", "num_samples": num_samples},
        "model": {"name": "small_conv_net", "ghost_batch": group},
        "optim": {"name": "sgd", "lr": 0.1, "momentum": momentum},
        "schedule": schedule,
    }
    return compile_plan(parse_job(tree), 1, num_samples)


def decimal_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def test_whole_multiples_are_those_of_the_number_without_its_floating_point_error() -> None:
    assert (0.1 + 0.7) * 10 == 7.999999999999999
    assert whole_multiples((0.1 + 0.7) * 10) == 8
    assert whole_multiples(7.9999) == 7


# --- batches ------------------------------------------------------------------------------------------


def test_16_and_a_half_ghost_batches_become_17() -> None:
    """264 is 5.5 ghost batches of 48, so the start is 288; 288 · 2.75 = 792 = 16.5 · 48."""
    grown = plan_of(10_000, 48, policy="grow", epochs=4.0, global_batch=288, boundaries_epochs=[2.0], noise_factor=2.75)
    assert [phase.global_batch for phase in grown.schedule.phases] == [288, 816]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.97])
@pytest.mark.parametrize("exact_noise", [False, True])
@pytest.mark.parametrize("policy", ["grow", "adabatch", "import"])
def test_every_tie_rounds_up_whatever_the_path_of_its_floats(policy: str, exact_noise: bool, momentum: float) -> None:
    """From 1 to 40 ghost batches to 0.5, 1.5 and 7.5 more: the factor is the float nearest to the one that wants that.

    The defect: whether a tie rounded up or down followed from the last digit of a float.
    """
    group, num_samples = 16, 60_000
    for groups, more in itertools.product(range(1, 41), (Fraction(1, 2), Fraction(3, 2), Fraction(15, 2))):
        base, wanted = Fraction(groups * group), (groups + more) * group
        plain, exact = wanted / base, (num_samples / base - 1) / (num_samples / wanted - 1)
        factor = float(exact if exact_noise else plain)
        own: dict[str, dict[str, Any]] = {
            "grow": {"boundaries_epochs": [2.0], "noise_factor": factor},
            "adabatch": {"every_epochs": 2.0, "batch_factor": factor, "lr_factor": 1.0},
            "import": {"lr_schedule": "steps", "lr_steps": [[2.0, 1 / factor]], "batch_multiple": group},
        }
        schedule = {"policy": policy, "epochs": 4.0, "global_batch": int(base), "exact_noise": exact_noise}
        plan = plan_of(num_samples, group, momentum, **schedule, max_batch="N/2", **own[policy])
        phase = plan.schedule.phases[1]
        assert phase.wanted_batch == pytest.approx(float(wanted), rel=1e-12)
        assert phase.global_batch == wanted + group // 2, (groups, more)


def test_a_momentum_near_1_decides_no_tie() -> None:
    """Raising m from 0.9999 to 0.99995 doubles B; with a factor of 1.25, 16 · 3 · 2 · 1.25 = 120 = 7.5 · 16."""
    plan = plan_of(
        60_000, 16, 0.9999, policy="grow", epochs=4.0, global_batch=48, raise_momentum_to=0.99995,
        boundaries_epochs=[2.0], noise_factor=1.25,
    )  # fmt: skip
    assert [phase.global_batch for phase in plan.schedule.phases] == [96, 128]


@given(twice=st.integers(1, 2_000_000), ulps=st.integers(-8, 8))
def test_a_float_next_to_a_tie_is_a_tie(twice: int, ulps: int) -> None:
    value = twice / 2
    for _ in range(abs(ulps)):
        value = math.nextafter(value, math.inf if ulps > 0 else 0.0)
    assert half_up(value) == (twice + 1) // 2


@given(value=st.floats(0, 1e9))
def test_everything_else_rounds_to_the_nearest(value: float) -> None:
    if abs(value % 1 - 0.5) > 0.002:
        assert half_up(value) == math.floor(Fraction(value) + Fraction(1, 2))


def test_large_whole_numbers_stay() -> None:
    for number in (10**9, 10**13, 2**53):
        assert half_up(float(number)) == whole_multiples(float(number)) == number


@pytest.mark.parametrize(
    ("trigger", "schedule"),
    [({"name": "adascale"}, {"batch_scale": 1e308}), ({"name": "norm_test", "max_batch_factor": 1e308}, {})],
)
def test_what_cannot_be_rounded_is_refused(trigger: dict[str, Any], schedule: dict[str, Any]) -> None:
    """The defect: a traceback, from infinity times a batch."""
    with pytest.raises(JobError, match="its numbers leave the range of floating point"):
        compile_plan(measured_job(trigger, schedule=schedule), 1, NUM_TRAIN)


# --- boundaries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "num_samples", "samples"),
    [
        (0.145, 100, 15),  # 14.5; the product of floats is 14.499999999999998
        (0.5, 301, 151),  # 150.5, which Python's round makes 150
        (0.68, 300, 204),  # the product of floats is 204.00000000000003
        (1.005, 1000, 1005),
        (0.35, 10, 4),  # 3.5
        (10 / 12, 15, 13),  # 12.5: 10/12 has no finite decimal form
        (0.144, 100, 14),
        (200.5, 10**9 + 1, 200_500_000_201),  # …200.5
    ],
)
def test_epochs_become_samples_by_the_decimal_number(epoch: float, num_samples: int, samples: int) -> None:
    assert samples_at(epoch, num_samples) == samples


@given(thousandths=st.integers(1, 200_000), num_samples=st.integers(1, 2_000_000))
def test_decimal_epochs_round_as_fractions_do(thousandths: int, num_samples: int) -> None:
    exact = Fraction(thousandths, 1000) * num_samples
    assert samples_at(thousandths / 1000, num_samples) == decimal_half_up(exact)


def test_a_phase_and_a_warm_up_end_where_the_decimal_number_does() -> None:
    schedule: dict[str, Any] = {"boundaries_epochs": [0.145], "noise_factor": 2.0, "warmup_epochs": 0.045}
    plan = plan_of(100, 7, policy="grow", epochs=0.5, global_batch=7, max_batch=14, **schedule)
    # The boundary is at 14.5 samples, so at 15, which the third update of 7 reaches; the warm-up at 4.5, so at 5.
    assert [phase.num_updates for phase in plan.schedule.phases] == [3, 3]
    assert plan.schedule.warmup.end_samples == 5


def test_adabatch_has_as_many_phases_as_whole_stretches() -> None:
    """The defect: 2.1 / 0.3 is 7.000000000000001 in floats, and an empty phase came at the end."""
    plan = plan_of(10_000, 16, policy="adabatch", epochs=2.1, every_epochs=0.3, global_batch=16, batch_factor=1.0)
    assert [phase.start_epoch for phase in plan.schedule.phases] == [0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8]


def test_a_step_at_the_end_of_the_run_is_refused() -> None:
    """The defect: 0.68 · 300 is 204.00000000000003 in floats, and the step at 204 made an empty phase."""
    with pytest.raises(
        ValueError,
        match=r"the last step, at 204 samples, is not before the end of the run at 204; remove it",
    ):
        plan_of(300, 8, policy="steps", epochs=0.68, batch_steps="0:16 204:32")


# --- what is due at multiples of an epoch -------------------------------------------------------------


@given(hundredths=st.integers(1, 300), num_samples=st.integers(1, 5000), count=st.integers(1, 50))
def test_what_is_due_every_so_often_is_due_at_the_sample_itself(hundredths: int, num_samples: int, count: int) -> None:
    """The defect: 0.07 · 100 is 7.000000000000001 in floats, so that what was due at 7 came an update later."""
    due = math.ceil(Fraction(hundredths * count * num_samples, 100))
    every = hundredths / 100
    assert periods_done(due, every, num_samples) >= count
    assert periods_done(due - 1, every, num_samples) < count
    assert period_ends(due - 1, due, every, num_samples)
    assert not period_ends(due, due, every, num_samples)


def test_a_plateau_counts_from_the_epoch_at_which_its_evaluation_was_due() -> None:
    rule = Plateau(section(name="plateau", patience_epochs=0.1), 100, 0.07, improves_up=False)
    looks = [rule.look(Measurement(samples, 8, 0.1, metric=1.0)) for samples in (7, 14, 21)]
    # The first is the best; 0.07 epochs later is within the patience of 0.1, 0.14 is not.
    assert [request is not None for request in looks] == [False, False, True]


# --- imported curves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 0.3, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("count", [1, 2, 8, 97])
def test_an_imported_polynomial_has_its_mean_in_every_phase(count: int, power: float) -> None:
    """Mean of (1 - t)^p by its antiderivative, with 40 digits. The defect: power 0.5 was off by 3e-6 in the last.

    A phase that requests more than N/2 = 30 000 samples is cut again, so that the run has at least 100 parts.
    """

    def means(first: int, last: int, parts: int) -> list[float]:
        with localcontext() as context:
            context.prec = 40
            exponent = Decimal(power) + 1
            left = [Decimal(parts - k) / parts for k in range(first, last + 1)]
            powers = [t**exponent if t else Decimal(0) for t in left]
            return [float(Decimal(parts) / exponent * (a - b)) for a, b in itertools.pairwise(powers)]

    cuts = math.ceil(100 / count)
    expected = []
    for k, mean in enumerate(means(0, count, count)):
        expected += [mean] if 2 / mean <= 30_000 + 1 else means(k * cuts, (k + 1) * cuts, count * cuts)
    plan = plan_of(
        60_000, 2, policy="import", epochs=900.0, global_batch=2, max_batch="N/2",
        lr_schedule="polynomial", power=power, num_phases=count,
    )  # fmt: skip
    first = 0.1 * 60_000 / (2 * 0.1)
    assert [plan.noise_scale(phase) / first for phase in plan.schedule.phases] == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.5, 2.0])
def test_an_imported_polynomial_is_torchs(power: float) -> None:
    """PolynomialLR, step by step, averaged over each phase: by the trapezoidal rule, so to the square of a step."""
    steps, count = 40_000, 4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=power)
    rates = [1.0]
    for _ in range(steps):
        optimizer.step()
        torchs.step()
        rates.append(optimizer.param_groups[0]["lr"])
    length = steps // count
    for k in range(count):
        part = rates[k * length : (k + 1) * length + 1]
        mean = (math.fsum(part) - (part[0] + part[-1]) / 2) / length
        assert polynomial_mean(k, count, power) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 8, 1000])
def test_an_imported_cosine_has_its_mean_in_every_phase(count: int) -> None:
    """Mean of (1 + cos πt)/2 by Gauss's rule with 20 points, which is exact to float64 for a piece of a cosine.

    cos²(πt/2) is the same without cancelling at the end.
    """
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(20))
    for k in range(count):
        # sin²(π (1-t)/2): 1-t is exact where t is near 1
        mean = float(
            (weights * torch.sin(math.pi * ((count - k) / count - (nodes + 1) / 2 / count) / 2) ** 2).sum() / 2
        )
        assert cosine_mean(k, count) == pytest.approx(mean, rel=1e-12)
