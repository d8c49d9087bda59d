from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hvd_batchgrow.nn.networks import small_conv_net
from hvd_batchgrow.optim.build import build_optimizer, set_hyperparameters
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.twin import decay_twin
from hvd_batchgrow.train.train_state import _load_optimizer
from tests.helpers import small_job

PHASE = Phase(0.0, 0.1, 0.9, 16, 16, start_samples=0, num_updates=10)


def make(**optim: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small_conv_net.build(1, 3, channels=(4, 8), ghost_batch=8, bn_momentum=0.1)
    job = small_job(optim=optim)
    return model, build_optimizer(model, job.optim)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_norm_parameters_and_biases_are_not_decayed(name: str) -> None:
    # (r): found by their shape; this network's names say "features.1.weight", not "bn"
    model, optimizer = make(name=name, weight_decay=0.5)
    for group in optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.5}
        assert group.get("adapt", True) == (name != "lars" or group["weight_decay"] == 0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_neither_rate_nor_batch_corrects_the_momentum_of_torchs_sgd() -> None:
    # (i): u = m u + g whatever ε and B do
    model, optimizer = make(momentum=0.9, weight_decay=0.0)
    weight = next(model.parameters())
    before = weight.detach().clone()
    moved = 0.0
    velocity = 0.0
    for lr, batch in ((0.1, 16), (0.02, 16), (0.02, 48), (0.3, 96)):
        set_hyperparameters(optimizer, replace(PHASE, lr=lr, global_batch=batch))
        step(model, optimizer)
        velocity = 0.9 * velocity + 1.0
        moved += lr * velocity
    torch.testing.assert_close(weight.detach(), before - moved)


@pytest.mark.parametrize(
    "schedule", [{"raise_momentum_to": 0.9, "max_batch": 10_000}, {"momenta": [0.0, 0.9, 0.9, 0.9]}], ids=str
)
def test_nesterov_begins_where_the_schedule_raises_the_momentum_from_0(schedule: dict[str, Any]) -> None:
    optim = {"momentum": 0.0, "nesterov": True, "weight_decay": 0.0}
    plan = compile_plan(small_job(optim=optim, schedule={"max_batch": 10_000, **schedule}), 1, 30_000)
    phase = plan.schedule.phases[-1]
    assert phase.momentum == 0.9
    model, optimizer = make(**optim)
    reference = copy.deepcopy(model)
    torchs = torch.optim.SGD(reference.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    for _ in range(3):
        set_hyperparameters(optimizer, replace(phase, lr=0.2))
        step(model, optimizer)
        step(reference, torchs)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)
    twin = decay_twin(plan.job, 30_000)
    assert compile_plan(twin, 1, 30_000).schedule.phases[0].momentum == 0


@pytest.mark.parametrize(("rescale", "level"), [(False, 1.9), (True, 1.9 * 0.1 / 0.05)])
def test_a_change_of_momentum_rescales_the_buffer_where_the_job_says_so(rescale: bool, level: float) -> None:
    model, optimizer = make(momentum=0.9, weight_decay=0.0)
    for _ in range(2):
        set_hyperparameters(optimizer, PHASE, rescale_momentum=rescale)
        step(model, optimizer)
    later = replace(PHASE, momentum=0.95)
    set_hyperparameters(optimizer, later, rescale_momentum=rescale)
    set_hyperparameters(optimizer, later, rescale_momentum=rescale)  # the change is made once
    buffer = optimizer.state[next(model.parameters())]["momentum_buffer"]
    torch.testing.assert_close(buffer, torch.full_like(buffer, level))


@pytest.mark.parametrize("updates", [5, 200, 1000])
def test_new_betas_keep_adams_averages_unbiased(updates: int) -> None:
    """With a constant gradient every average is that gradient, so each step of Adam is the learning rate."""
    model, optimizer = make(name="adam", lr=1e-3, betas=(0.9, 0.999), eps=1e-12)
    weight, first = next(model.parameters()), replace(PHASE, lr=1e-3, momentum=0.9, beta2=0.999)
    grown = replace(first, momentum=0.9**4, beta2=0.999**4)
    for phase in [*[first] * updates, *[grown] * 3, *[first] * 3]:
        before = weight.detach().clone()
        set_hyperparameters(optimizer, phase)
        step(model, optimizer)
        torch.testing.assert_close(before - weight.detach(), torch.full_like(before, 1e-3), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("updates", [1, 20, 100])
@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.99, 0.9), (0.9, 0.0), (0.0, 0.9)], ids=str)
def test_a_new_beta1_keeps_adams_average_unbiased(name: str, updates: int, betas: tuple[float, float]) -> None:
    """As above, each step is the learning rate. The defect: 2.55 learning rates after 0.9 → 0.98 at update 20."""
    model, optimizer = make(name=name, lr=1e-3, betas=(betas[0], 0.999), eps=1e-12)
    weight = next(model.parameters())
    first, later = (replace(PHASE, lr=1e-3, momentum=beta) for beta in betas)
    for phase in [*[first] * updates, *[later] * 3, *[first] * 3]:
        before = weight.detach().clone()
        set_hyperparameters(optimizer, phase)
        step(model, optimizer)
        torch.testing.assert_close(before - weight.detach(), torch.full_like(before, 1e-3), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("updates", [0, 1, 5])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.999)], ids=str)
def test_averages_stay_unbiased_after_a_phase_with_a_beta2_of_0(
    name: str, updates: int, betas: tuple[float, float]
) -> None:
    """As above, each step is the learning rate. The defect: 0.1 of it after 1 update with β₂ = 0."""
    model, optimizer = make(name=name, lr=1e-3, betas=(0.9, 0.0), eps=1e-12)
    weight = next(model.parameters())
    first, later = (replace(PHASE, lr=1e-3, momentum=b1, beta2=b2) for b1, b2 in ((0.9, 0.0), betas))
    for phase in [*[first] * updates, *[later] * 4, *[first] * 2, *[later] * 2]:
        before = weight.detach().clone()
        set_hyperparameters(optimizer, phase)
        step(model, optimizer)
        torch.testing.assert_close(before - weight.detach(), torch.full_like(before, 1e-3), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam])
def test_a_new_beta1_keeps_the_average_of_torchs_other_adams_unbiased(kind: Any) -> None:
    """Under a gradient of 1, each average is 1 and no step differs. NAdam corrects by a product of all β₁."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=1e-3, betas=(0.9, 0.999))
    sizes = []
    for momentum in [0.9] * 20 + [0.98] * 3:
        set_hyperparameters(optimizer, replace(PHASE, lr=1e-3, momentum=momentum))
        before, weight.grad = weight.detach().clone(), torch.ones(3)
        optimizer.step()
        sizes.append(float((before - weight.detach()).mean()))
    assert sizes[19] == pytest.approx(1e-3, rel=0.06)
    assert sizes[20:] == pytest.approx([sizes[19]] * 3, rel=0.01)


def test_a_new_beta1_leaves_averages_that_are_not_corrected() -> None:
    """Lion and others have "betas" and an average, but count no steps and correct nothing."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    optimizer.param_groups[0]["eps"] = 0.0
    optimizer.state[weight]["exp_avg"] = torch.ones(3)
    set_hyperparameters(optimizer, replace(PHASE, momentum=0.95, beta2=0.98))
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.98)
    assert optimizer.state[weight]["exp_avg"].tolist() == [1.0] * 3


class Counting(torch.optim.Optimizer):
    """Adam whose groups have no eps and may have a third beta, and that counts its steps as a Python number."""

    def __init__(self, params: Any, betas: tuple[float, ...]) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
                state["step"] += 1
                averages = []
                for key, value, beta in zip(
                    ("exp_avg", "exp_avg_sq"), (param.grad, param.grad.square()), group["betas"], strict=False
                ):
                    state[key].mul_(beta).add_(value, alpha=1 - beta)
                    averages.append(state[key] / (1 - beta ** state["step"]))
                param.sub_(group["lr"] * averages[0] / averages[1].sqrt())


@pytest.mark.parametrize("first", [0.99, 0.0])
def test_steps_may_be_counted_as_a_python_number(first: float) -> None:
    """With a constant gradient each corrected average is that gradient, so each step is the learning rate."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Counting([weight], (0.9, first))
    for beta2 in [first] * 5 + [0.9] * 3 + [0.98] * 2:
        set_hyperparameters(optimizer, replace(PHASE, lr=1e-3, beta2=beta2))
        before, weight.grad = weight.detach().clone(), torch.full((3,), 2.0, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(before - weight.detach(), torch.full_like(before, 1e-3), rtol=1e-9, atol=0)
    assert isinstance(optimizer.state[weight]["step"], float)


def test_groups_without_eps_get_none_and_keep_a_third_beta() -> None:
    """Lion has no eps; Adan has three betas."""
    optimizer = Counting([nn.Parameter(torch.ones(3))], (0.98, 0.92, 0.99))
    group = optimizer.param_groups[0]
    set_hyperparameters(optimizer, replace(PHASE, momentum=0.95))
    assert group["betas"] == (0.95, 0.92, 0.99)
    assert "eps" not in group
    set_hyperparameters(optimizer, replace(PHASE, momentum=0.9, beta2=0.8))
    assert group["betas"] == (0.9, 0.8, 0.99)


def test_only_groups_with_momentum_get_one() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1, momentum=0.9)
    del optimizer.param_groups[1]["momentum"]
    set_hyperparameters(optimizer, replace(PHASE, momentum=0.0))
    assert [group.get("momentum") for group in optimizer.param_groups] == [0.0, None]
    with pytest.raises(ValueError, match=r"SGD has no momentum, and the plan sets 0.9; use plan_updates"):
        set_hyperparameters(optimizer, PHASE)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["sgd", "lars", "rmsprop"])
def test_a_phase_without_momentum_clears_the_buffer(name: str, rescale: bool) -> None:
    """The gradient is 1 and then 0 from the middle phase on, so after it nothing moves. The defect: a step of 0.9."""
    model, optimizer = make(name="sgd" if name == "rmsprop" else name, momentum=0.9, weight_decay=0.0)
    if name == "rmsprop":
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.1, momentum=0.9)
    for momentum, gradient in [(0.9, 1.0)] * 50 + [(0.0, 0.0)] * 50 + [(0.9, 0.0)]:
        set_hyperparameters(optimizer, replace(PHASE, momentum=momentum), rescale_momentum=rescale)
        before = copy.deepcopy(model.state_dict())
        step(model, optimizer, gradient)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_step_of_adam_is_that_of_an_average_with_the_new_beta2() -> None:
    """0.9⁸ = (0.9⁴)², so eight steps at β₂ = 0.9 are two at 0.6561."""
    model, optimizer = make(name="adam", lr=1e-3, betas=(0.9, 0.9))
    for _ in range(8):
        step(model, optimizer)
    set_hyperparameters(optimizer, replace(PHASE, beta2=0.9**4))
    assert optimizer.state[next(model.parameters())]["step"].item() == pytest.approx(2.0, rel=1e-6)


def test_a_fork_with_another_beta2_keeps_adams_averages_unbiased() -> None:
    """0.999²⁰⁰ = 0.9^1.8992: 200 ln 0.999 / ln 0.9 = 1.8992. β₁ = 0.8: 1 - 0.8^1.8992 = 0.3454, and 1 - 0.8²⁰⁰ = 1."""
    model, saved = make(name="adam", betas=(0.8, 0.999))
    step(model, saved)
    for state in saved.state.values():
        state["step"].fill_(200)
    model, optimizer = make(name="adam", betas=(0.7, 0.9))
    _load_optimizer(optimizer, saved.state_dict(), keeps_beta2=False)
    assert optimizer.state[next(model.parameters())]["step"].item() == pytest.approx(1.8992, abs=1e-4)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)  # the schedule sets β₁
    parameter = next(model.parameters())
    scaled = 0.2 * 0.3454  # of the average 0.2 after one step with a gradient of 1
    torch.testing.assert_close(
        optimizer.state[parameter]["exp_avg"], torch.full_like(parameter, scaled), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_takes_its_set_from_the_phase(name: str, kind: type[torch.optim.Optimizer]) -> None:
    _, optimizer = make(name=name, lr=1e-3, betas=(0.8, 0.99), eps=1e-6)
    assert isinstance(optimizer, kind)
    assert type(optimizer).__name__ == kind.__name__
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.99), 1e-6)
    set_hyperparameters(optimizer, replace(PHASE, lr=2e-3, momentum=0.6, beta2=0.98, eps=5e-7))
    assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.6, 0.98), 5e-7)
    set_hyperparameters(optimizer, replace(PHASE, lr=2e-3, momentum=0.7))
    assert group["betas"] == (0.7, 0.98)
