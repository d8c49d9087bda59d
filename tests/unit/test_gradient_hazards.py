"""Networks whose gradients, but not whose outputs, depend on how a batch is divided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.data.datasets.example import Example
from hvd_batchgrow.nn.checks.layout_hazards import layout_hazards
from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d

TEXT = "the gradient over a batch is not the sum over its samples"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """Two layers, with a function of the network and the hidden values between them."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Any:
        return self.last(self.between(self, self.first(x)))


def centered_gradient(net: Net, hidden: Tensor) -> Tensor:
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient - gradient.mean(0))
    return hidden


def mean_times_gain(net: Net, hidden: Tensor) -> Tensor:
    return hidden + net.gain * hidden.mean(0)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (lambda: Net(centered_gradient), "first.weight"),  # the gradient of first.bias is 0
        (lambda: Net(mean_times_gain, gain=torch.zeros(())), "gain"),
    ],
)
def test_a_gradient_that_depends_on_the_division_of_a_batch_is_named(net: Callable[[], Net], names: str) -> None:
    model, x = net(), torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(x[:2]), model(x[2:])]))  # no forward shows it
    assert layout_hazards(model, (6,)) == [f"{names}: {TEXT}"]


class Tokens(nn.Module):
    def __init__(self, *, by_freq: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(3, 4, scale_grad_by_freq=by_freq), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(tokens).sum(1))
        return logits


def test_an_embedding_that_divides_gradients_by_frequency_is_named() -> None:
    """Token 1 occurs 4 times in two samples. torch divides its summed gradient 4 g by 4, or twice 2 g by 2."""
    model, tokens = Tokens(by_freq=True), torch.ones(2, 2, dtype=torch.int64)
    g = model.head.weight.detach().sum(0)  # of the sum of the logits
    for parts, expected in (((tokens,), g), (tokens.split(1), 2 * g)):
        model.zero_grad()
        for part in parts:
            model(part).sum().backward()
        assert model.table.weight.grad is not None
        torch.testing.assert_close(model.table.weight.grad[1], expected)
    form = Example(tokens, tokens[:, 0])
    assert layout_hazards(model, form) == [f"table.weight: {TEXT}"]
    assert layout_hazards(Tokens(by_freq=False), form) == []


class Images(nn.Module):
    """The gradient of the convolution's bias is 0 but for rounding, because the norm subtracts the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
        return logits


class WithOtherOutputs(Net):
    """Some outputs are parameters, which each forward returns once, however many samples it has."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        weights = {"noise": self.noise, "queries": self.queries, "scale": self.scale}
        return {**weights, "logits": super().forward(x), "index": torch.arange(len(x))}


class Experts(nn.Module):
    """Each sample goes to one of two layers, so that a part of the batch may not reach a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for layer, rows in zip(self.layers, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            if rows.any():
                out[rows] = layer(x[rows])
        return out


class LongSum(nn.Module):
    """The gradient of the shift is a sum over 2000 places of each sample, in which bfloat16 loses all small terms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


def frozen() -> nn.Module:
    return nn.Linear(6, 3).requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 8), GhostBatchNorm1d(8, 4), KeyedDropout(0.5), nn.Linear(8, 3)), (6,)),
        (Images, (3, 8, 8)),
        (
            lambda: WithOtherOutputs(
                lambda net, hidden: hidden.tanh(),
                noise=torch.randn(3),
                queries=torch.randn(7, 2),
                scale=torch.ones(()),
            ),
            (6,),
        ),
        (Experts, (6,)),
        (frozen, (6,)),
        (lambda: LongSum().bfloat16(), (2000, 3)),
    ],
)
def test_rounding_and_outputs_without_rows_are_not_hazards(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    assert layout_hazards(make(), shape) == []


def test_the_trial_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 8), GhostBatchNorm1d(8, 16), nn.Tanh(), nn.Linear(8, 3))
    model[0].weight.grad = torch.ones(8, 6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    layout_hazards(model, (6,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad, torch.ones(8, 6))
    assert model[0].bias.grad is None
    assert model[1].training
