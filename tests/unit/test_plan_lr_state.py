"""What `PlanLR` does to the state of an optimizer: nothing, except where a phase changes the momentum or the betas."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from hvd_batchgrow.library import Lars, Plan, PlanBatchSampler, PlanLR, plan_updates
from hvd_batchgrow.messages.errors import JobError

SEED = 1


def plan_of(momenta: list[float], **optim: Any) -> Plan:
    """8 samples per update up to sample 200, and at most 24 afterwards; each phase has its own momentum."""
    schedule = {
        "policy": "grow",
        "epochs": 8,
        "global_batch": 8,
        "boundaries_epochs": [2],
        "noise_factor": 2,
        "max_batch": 24,
        "momenta": momenta,
    }
    return plan_updates(schedule, lr=0.1, momentum=momenta[0], num_samples=100, ghost_batch=8, optim=optim)


def steps(weight: nn.Parameter, optimizer: torch.optim.Optimizer, scheduler: PlanLR, number: int) -> None:
    for _ in range(number):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("rescale", "factor"), [(False, 1.0), (True, 2.0)])
def test_the_buffer_is_rescaled_at_the_boundary_if_the_plan_says_so(rescale: bool, factor: float) -> None:
    """(1 - 0.9) / (1 - 0.95) = 2. Under a constant gradient of 1, the buffer is (1 - 0.9²⁵) / (1 - 0.9)."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scheduler = PlanLR(optimizer, plan_of([0.9, 0.95], rescale_momentum=rescale))
    steps(weight, optimizer, scheduler, 25)
    assert (scheduler.samples, optimizer.param_groups[0]["momentum"]) == (200, 0.95)
    level = (1 - 0.9**25) / (1 - 0.9)
    buffer = optimizer.state[weight]["momentum_buffer"]
    assert buffer.tolist() == pytest.approx([factor * level] * 2, rel=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Lars])
@pytest.mark.parametrize("momenta", [[0.0, 0.9], [0.9, 0.0], [0.9, 0.95]], ids=str)
@pytest.mark.parametrize("done", [10, 25, 30])
@pytest.mark.parametrize("order", ["scheduler first", "state first", "sampler"])
def test_the_state_may_be_loaded_before_or_after_the_scheduler_is_made(
    order: str, done: int, momenta: list[float], kind: Any
) -> None:
    plan = plan_of(momenta, rescale_momentum=True)

    def made() -> tuple[nn.Parameter, Any]:
        weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        return weight, kind([weight], lr=0.1, momentum=momenta[0])

    weight, optimizer = made()
    scheduler = PlanLR(optimizer, plan)
    steps(weight, optimizer, scheduler, done)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), weight.detach()))

    resumed, other = made()
    if order != "scheduler first":
        other.load_state_dict(saved[0])
    sampler = PlanBatchSampler(plan, SEED, start_samples=saved[1]["samples"]) if order == "sampler" else None
    again = PlanLR(other, plan, sampler)
    if order == "scheduler first":
        other.load_state_dict(saved[0])
    if not sampler:
        again.load_state_dict(saved[1])
    resumed.data.copy_(saved[2])
    steps(weight, optimizer, scheduler, 5)
    steps(resumed, other, again, 5)
    assert torch.equal(resumed, weight)


@pytest.mark.parametrize("updates", [6, 8, 10, 12])
def test_betas_leave_a_loaded_state_of_adam_as_it_is(updates: int) -> None:
    """β₂ of the first phase would make other counts of steps, which come back only up to rounding."""
    schedule = {"policy": "steps", "epochs": 4.0, "batch_steps": "0:8 40:24", "lr_rule": "adam_linear"}
    options: dict[str, Any] = {"optim": {"name": "adam", "betas": [0.9, 0.999]}, "num_samples": 100, "ghost_batch": 8}
    plan = plan_updates(schedule, lr=0.02, **options)
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight], lr=0.02)
    steps(weight, optimizer, PlanLR(optimizer, plan), updates)
    before = copy.deepcopy(optimizer.state[weight])
    done = 5 * math.log(0.999) / math.log(0.997) + updates - 5  # the first 5 updates have β₂ = 0.999
    assert before["step"].item() == pytest.approx(done, rel=1e-6)
    PlanLR(optimizer, plan).set_samples(40 + 24 * (updates - 5))
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in before.items())
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.7, 0.997))


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("nesterov", True, "set it in your optimizer"),
        ("trust_coefficient", 0.01, "set it in your optimizer"),
        ("groups", [{"match": "*.bias", "lr_scale": 2.0}], "set it in the parameter groups of your optimizer"),
        ("layer_decay", 0.5, "set it in the parameter groups of your optimizer: lr of each"),
        ("decay_norm_and_bias", True, "set it in the parameter groups of your optimizer: weight_decay of each"),
        ("lr", 0.3, r"give plan_updates\(…, lr=…\)"),
        ("momentum", 0.3, r"give plan_updates\(…, momentum=…\), or betas for Adam"),
    ],
)
def test_keys_without_effect_on_a_plan_are_refused(key: str, value: Any, remedy: str) -> None:
    with pytest.raises(JobError, match=rf"optim\.{key}: has no effect on a plan; {remedy}"):
        plan_of([0.9, 0.95], **{key: value})
