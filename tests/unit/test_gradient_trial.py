"""Trial passes that check whether gradients can be summed over micro-batches."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.checks.gradient_trial import gradient_fault
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), GhostBatchNorm1d(8, 16), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def example() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def scaled(net: nn.Sequential) -> None:
    net.get_parameter("0.weight").register_hook(lambda gradient: gradient * 0.5)


def clipped(net: nn.Sequential) -> None:
    net.get_parameter("0.weight").register_hook(lambda gradient: gradient.clamp(-10, 10))


def regularized(net: nn.Sequential) -> None:
    weight = net.get_parameter("0.weight")
    weight.register_hook(lambda gradient: gradient + 0.1 * weight.detach())


def halved_sum(net: nn.Sequential) -> None:
    def halve(weight: Tensor) -> None:
        assert weight.grad is not None
        weight.grad.mul_(0.5)

    net.get_parameter("0.weight").register_post_accumulate_grad_hook(halve)


def cleared(net: nn.Sequential) -> None:
    net.register_forward_pre_hook(lambda module, inputs: module.zero_grad())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda net: None, None),
        (scaled, None),
        (clipped, "the gradient of 0.weight is not proportional to the loss"),
        (regularized, "the gradient of 0.weight is not proportional to the loss"),
        (halved_sum, "the gradients of two backward passes do not add up in 0.weight: a hook or the forward pass"),
        (cleared, "do not add up in 0.weight, 0.bias, 1.weight and 3 more"),
    ],
)
def test_gradients_must_add_up_and_be_proportional_to_the_loss(
    change: Callable[[nn.Sequential], None], fault: str | None
) -> None:
    net = network()
    change(net)
    found = gradient_fault(net, example())
    assert found is None if fault is None else fault in (found or "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_of_any_precision_pass(dtype: torch.dtype) -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    assert gradient_fault(plain, example().to(dtype)) is None


def test_a_sparse_gradient_is_named() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.table((x[:, 0] > 0).long())
            return out

    assert gradient_fault(Table(), example()) == (
        "the gradient of table.weight is sparse; build its layer with sparse=False"
    )


def test_random_numbers_are_not_a_fault() -> None:
    """Neither those of a global generator, restored before each pass, nor those of another source."""

    class Noisy(nn.Module):
        def __init__(self, draw: Callable[[], float]) -> None:
            super().__init__()
            self.layer, self.draw = nn.Linear(6, 3), draw

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x * (0.5 + self.draw()))
            return out

    source = random.SystemRandom()
    for draw in (random.random, lambda: float(torch.rand(())), source.random):
        assert gradient_fault(Noisy(draw), example()) is None


def test_the_trial_changes_nothing() -> None:
    net, inputs = network(), example()
    net[0].weight.grad = torch.ones(8, 6)
    before, samples = copy.deepcopy(net.state_dict()), inputs.clone()
    gradient_fault(net, inputs)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(inputs, samples)
    assert torch.equal(net[0].weight.grad, torch.ones(8, 6))
    assert net[0].bias.grad is None
    norm = net[1]
    assert isinstance(norm, GhostBatchNorm1d)
    assert len(norm.take_statistics()) == 0
