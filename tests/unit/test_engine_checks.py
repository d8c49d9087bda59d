"""What an engine checks: that model and optimizer belong together, the modes of norms, and the keys of samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hvd_batchgrow.library import (
    KeyedDropout,
    Losses,
    MicroBatch,
    Plan,
    SingleRank,
    UpdateEngine,
    convert_ghost_batch_norm,
    plan_updates,
    updates,
)

SEED, N = 1, 64
INPUTS = torch.randn(N, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
TARGETS = torch.randn(N, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Scaled(nn.Module):
    """A network, and a log variance that only its loss uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Linear(3, 1).double()
        self.log_variance = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def losses(self, ids: Tensor) -> Tensor:
        """Return the loss of each sample: a Gaussian's negative log-likelihood, without its constant."""
        errors = (self.net(INPUTS[ids]) - TARGETS[ids]).square()
        found: Tensor = errors * torch.exp(-self.log_variance) + self.log_variance
        return found.squeeze(1)


def plan_of(momentum: float = 0.9, *, exact: bool = False) -> Plan:
    schedule = {"policy": "steps", "epochs": 2.0, "batch_steps": "0:8"}
    options: dict[str, Any] = {"ghost_batch": 4, "max_micro_batch": 4, "exact": exact}
    return plan_updates(schedule, lr=0.1, momentum=momentum, num_samples=N, **options)


def train(engine: UpdateEngine, plan: Plan, *, with_keys: bool = True) -> list[Tensor]:
    """Train with micro-batches whose inputs are ids; return the ids of each update."""
    order = []
    for update in updates(plan, SEED):
        parts = [(torch.from_numpy(part.ids), part) for part in update.micro_batches]
        micro_batches = [
            MicroBatch(ids, None, part.slots, keys=part.keys if with_keys else None) for ids, part in parts
        ]
        engine.update(iter(micro_batches), len(parts), update.phase, update.num_ghost_batches)
        order.append(torch.cat([ids for ids, _ in parts]))
    return order


def test_a_parameter_outside_the_model_is_refused_and_trained_as_part_of_it() -> None:
    """Its gradient was never set to 0, and not divided by the batch."""
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    refused = (
        r"parameter group 0 of the optimizer has 1 parameter that the model does not have \(shape \(\)\): their "
        r"gradients would be neither averaged nor set to 0\. Make them part of the model: register them"
    )
    with pytest.raises(ValueError, match=refused):
        UpdateEngine(model.net, optimizer, SingleRank())
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the model does not have \(log_variance\)"):
        UpdateEngine(model.net, named, SingleRank())

    plain = copy.deepcopy(model)
    engine = UpdateEngine(model, optimizer, SingleRank(), forward=lambda _, part: Losses(model.losses(part.inputs)))
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for ids in train(engine, plan_of()):
        reference.zero_grad()
        plain.losses(ids).mean().backward()
        reference.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)
    assert model.log_variance.item() != pytest.approx(0.3, abs=0.01)


def test_a_trainable_parameter_in_no_group_is_refused_unless_it_is_frozen() -> None:
    """It would count in the norm that clips the gradient."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD([*model[1].parameters(), nn.Parameter(torch.ones(1), requires_grad=False)], lr=0.1)
    message = (
        r"the optimizer lacks 2 parameters of the model \(0\.weight, 0\.bias\).*Set requires_grad = False for them"
    )
    with pytest.raises(ValueError, match=message):
        UpdateEngine(model, optimizer, SingleRank())
    model[0].requires_grad_(False)
    UpdateEngine(model, optimizer, SingleRank())


@pytest.mark.parametrize("exact", [False, True])
def test_exact_dropout_needs_the_keys_of_the_samples(exact: bool) -> None:
    """Without them, it drew from torch's generator, so that the result depended on it and on the layout."""

    def train_with(torch_seed: int, *, with_keys: bool = True) -> Tensor:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(3, 16), KeyedDropout(0.5), nn.Linear(16, 1)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def forward(network: nn.Module, part: MicroBatch) -> Losses:
            return Losses(mse_loss(network(INPUTS[part.inputs]), TARGETS[part.inputs], reduction="none").squeeze(1))

        engine = UpdateEngine(model, optimizer, SingleRank(), forward=forward, exact=exact)
        torch.manual_seed(torch_seed)
        train(engine, plan_of(exact=exact), with_keys=with_keys)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    assert torch.equal(train_with(6), train_with(7))
    if exact:
        with pytest.raises(ValueError, match=r"has no keys, from which dropout draws .*PlannedMicroBatch.micro_batch"):
            train_with(6, with_keys=False)
    else:
        assert not torch.equal(train_with(6, with_keys=False), train_with(7, with_keys=False))


class StillNorm(nn.Sequential):
    """A network whose `train()` keeps its second module in evaluation mode."""

    def train(self, mode: bool = True) -> StillNorm:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("ghost", [False, True])
def test_a_norm_in_evaluation_mode_is_refused_unless_train_keeps_it_there(ghost: bool) -> None:
    """The engine calls `train()`: the statistics that the user wanted to keep were trained."""

    def made(kind: type[nn.Sequential]) -> Any:
        model: nn.Module = kind(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
        model = convert_ghost_batch_norm(model, 4) if ghost else model
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def mean_after(model: Any, optimizer: torch.optim.Optimizer) -> Tensor:
        def forward(network: nn.Module, part: MicroBatch) -> Losses:
            return Losses(network(INPUTS[part.inputs]).square().squeeze(1))

        train(UpdateEngine(model, optimizer, SingleRank(), forward=forward), plan_of())
        mean: Tensor = model[1].running_mean
        return mean

    model, optimizer = made(nn.Sequential)
    model[1].eval()
    with pytest.raises(ValueError, match=r"1 norm in evaluation mode \(1\), but the engine calls model.train\(\)"):
        UpdateEngine(model, optimizer, SingleRank())
    model.eval()  # such as after an evaluation: the mode of the whole model
    assert mean_after(model, optimizer).abs().max() > 0.01
    assert mean_after(*made(StillNorm)).tolist() == [0.0] * 4
    if ghost:
        model, optimizer = made(nn.Sequential)
        model[1].frozen = True
        model[1].eval()
        assert mean_after(model, optimizer).tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adafactor])
def test_an_optimizer_without_momentum_needs_phases_without_momentum(kind: Any) -> None:
    model = Scaled()

    def engine() -> UpdateEngine:
        optimizer = kind(model.parameters(), lr=0.1)
        return UpdateEngine(model, optimizer, SingleRank(), forward=lambda _, part: Losses(model.losses(part.inputs)))

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{kind.__name__} has no momentum, and the plan sets 0.9; use plan_updates"):
        train(engine(), plan_of())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    plain = copy.deepcopy(model)
    reference = kind(plain.parameters(), lr=0.1)
    for ids in train(engine(), plan_of(momentum=0.0)):
        reference.zero_grad()
        plain.losses(ids).mean().backward()
        reference.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-10)
