from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.checks.layout_hazards import layout_hazards
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
from hvd_batchgrow.nn.networks import small_conv_net

SHAPE, WHOLE = (2, 4, 4), "the network's own forward"
EXAMPLE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


class Calls(nn.Module):
    """A module that applies a function after a convolution."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(2, 2, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x))  # type: ignore[no-any-return]


def drawn(*paths: str) -> list[str]:
    return [f"{', '.join(paths)}: random numbers that are not keyed by sample"] if paths else []


def stack(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 2, 1), *modules)


def counted(module: nn.Module, x: Tensor) -> Tensor:
    module.count = getattr(module, "count", 0) + 1  # type: ignore[assignment]
    return x * module.count  # type: ignore[operator]


def on_its_own(module: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(module, "generator"):
        module.generator = torch.Generator().manual_seed(1)  # type: ignore[assignment]
    generator: Any = module.generator
    return x + torch.rand(x.shape, generator=generator)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (small_conv_net.build(2, 3, channels=(4, 8), ghost_batch=8, bn_momentum=0.1), []),
        (stack(nn.Dropout(0.0), GhostBatchNorm2d(2, 8), nn.Identity()), []),
        (stack(nn.Dropout(0.5)), ["1"]),
        (stack(nn.Dropout2d(0.1), nn.Sequential(nn.ReLU(), nn.AlphaDropout(0.2))), ["1", "2.1"]),
        (stack(nn.RReLU()), ["1"]),
        (Calls(lambda net, x: nn.functional.dropout(x, 0.5, net.training)), [WHOLE]),
        (stack(Calls(lambda net, x: x * random.gauss(0, 1))), ["1"]),
        (stack(Calls(lambda net, x: x * np.random.random())), ["1"]),
        (stack(Calls(lambda net, x: x), Calls(on_its_own), nn.ReLU()), ["2"]),
        (stack(Calls(counted)), ["1"]),
        (stack(Calls(lambda net, x: x if net.training else torch.rand_like(x))), []),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_the_innermost_module_that_draws_is_named(model: nn.Module, expected: list[str]) -> None:
    assert layout_hazards(model, SHAPE) == drawn(*expected)


def test_a_module_that_draws_before_its_child_is_named_too() -> None:
    model = Calls(lambda net, x: net.drop(x + torch.rand(1)))
    model.drop = nn.Dropout(0.5)
    assert layout_hazards(model, SHAPE) == drawn(WHOLE, "drop")


def test_model_and_generators_are_not_changed() -> None:
    norm = GhostBatchNorm2d(2, 8)
    model = stack(norm, nn.BatchNorm2d(2), nn.Dropout(0.5)).eval()
    model[2].train()
    norm.deferred = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    expected = torch.rand(1), random.gauss(0, 1), np.random.random()
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    assert layout_hazards(model, SHAPE) == drawn("3")
    assert (torch.rand(1), random.gauss(0, 1), np.random.random()) == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [False, False, True, False]
    assert model[1] is norm
    assert (norm.ghost_batch, norm.deferred) == (8, True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(norm(EXAMPLE), norm(EXAMPLE))


def test_a_forward_that_fails_changes_nothing_either() -> None:
    model = stack(nn.Linear(9, 9), nn.Dropout(0.5)).eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layout_hazards(model, SHAPE)
    assert not any(module.training or module._forward_hooks for module in model.modules())
