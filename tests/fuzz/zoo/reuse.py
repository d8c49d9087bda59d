"""Layers that a forward uses more than once, not always, or again in the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.fuzz.zoo.entry import FEATURES, Around, dense_net, images, network
from tests.fuzz.zoo.layers import Mean


def _three(num_classes: int, middle: Any) -> nn.Module:
    """A layer before, a function of a layer in the middle, a layer after."""

    def forward(net: Any, x: Tensor) -> Any:
        return net.last(middle(net.middle, net.first(x)))

    parts = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, num_classes)
    return Around(forward, **dict(zip(("first", "middle", "last"), parts, strict=True)))


@network()
def thrice(num_classes: int) -> nn.Module:
    return _three(num_classes, lambda layer, x: layer(layer(layer(x).tanh()).tanh()).tanh())


@network()
def checkpointed(num_classes: int) -> nn.Module:
    return _three(num_classes, lambda layer, x: checkpoint(lambda y: layer(y).tanh(), x, use_reentrant=False))


@network()
def checkpointed_reentrant(num_classes: int) -> nn.Module:
    return _three(num_classes, lambda layer, x: checkpoint(lambda y: layer(y).tanh(), x, use_reentrant=True))


def _loop(layer: nn.Module, x: Tensor, *, reentrant: bool) -> Tensor:
    for _ in range(3):
        x = x + checkpoint(lambda y: layer(y).tanh(), x, use_reentrant=reentrant)
    return x


@network()
def thrice_checkpointed(num_classes: int) -> nn.Module:
    return _three(num_classes, lambda layer, x: _loop(layer, x, reentrant=False))


@network()
def thrice_checkpointed_reentrant(num_classes: int) -> nn.Module:
    return _three(num_classes, lambda layer, x: _loop(layer, x, reentrant=True))


@network()
def nested_checkpoints(num_classes: int) -> nn.Module:
    def middle(layer: nn.Module, x: Tensor) -> Any:
        def inner(y: Tensor) -> Any:
            return checkpoint(lambda z: layer(z).tanh(), y, use_reentrant=True) * 2

        return checkpoint(lambda y: layer(inner(y)), x, use_reentrant=True)

    return _three(num_classes, middle)


@network()
def checkpointed_segments(num_classes: int) -> nn.Module:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])

    def forward(net: Any, x: Tensor) -> Any:
        return net.last(checkpoint_sequential(net.layers, 2, net.first(x), use_reentrant=True))

    return Around(forward, first=nn.Linear(FEATURES, 8), layers=layers, last=nn.Linear(8, num_classes))


@network()
def checkpointed_on_rows(num_classes: int) -> nn.Module:
    """Each sample is in a separate reentrant checkpoint, whose hook fires once per sample."""

    def middle(layer: nn.Module, x: Tensor) -> Any:
        return torch.cat([checkpoint(lambda y: layer(y).tanh(), row, use_reentrant=True) for row in x.split(1)])

    return _three(num_classes, middle)


def _block(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU())


@network()
def batch_norm_checkpointed(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        return net.head(checkpoint(net.block, net.images(x), use_reentrant=False))

    head = nn.Sequential(Mean(), nn.Linear(8, num_classes))
    return Around(forward, images=images(), block=_block(nn.BatchNorm2d(8)), head=head)


@network()
def batch_norm_checkpointed_reentrant(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        return net.head(checkpoint(net.block, net.stem(net.images(x)), use_reentrant=True))

    head = nn.Sequential(Mean(), nn.Linear(8, num_classes))
    return Around(forward, images=images(), stem=nn.Conv2d(3, 3, 1), block=_block(nn.BatchNorm2d(8)), head=head)


@network()
def dropout_checkpointed(num_classes: int) -> nn.Module:
    """Dropout in an activation checkpoint: the repeated masks must be equal. The reference supports only p = 0."""
    dropout = nn.Dropout(0.0)
    return _three(num_classes, lambda layer, x: checkpoint(lambda y: dropout(layer(y)), x, use_reentrant=False))


@network()
def deep_copied(num_classes: int) -> nn.Module:
    shared = nn.Linear(8, 8)
    twin = copy.deepcopy(nn.ModuleList([shared, nn.Tanh(), shared]))
    return nn.Sequential(nn.Linear(FEATURES, 8), *twin, nn.Linear(8, num_classes))


@network()
def one_layer_under_two_names(num_classes: int) -> nn.Module:
    layer = nn.Linear(8, 8)
    return Around(
        lambda net, x: net.last(net.b(net.a(net.first(x)).tanh()).tanh()),
        first=nn.Linear(FEATURES, 8),
        a=layer,
        b=nn.Sequential(layer),
        last=nn.Linear(8, num_classes),
    )


@network()
def as_often_as_the_data_say(num_classes: int) -> nn.Module:
    """Each sample passes the layer up to three times; some ghost batches never pass it."""

    def middle(layer: nn.Module, x: Tensor) -> Any:
        for times in range(3):
            x = torch.where(x[:, :1] > times * 0.5, layer(x).tanh(), x)
        return x

    return _three(num_classes, middle)


@network()
def functional_call(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        halved = {name: weight / 2 for name, weight in net.net.named_parameters()}
        return torch.func.functional_call(net.net, halved, (x,))

    return Around(forward, net=dense_net(num_classes))


@network()
def ensemble_by_vmap(num_classes: int) -> nn.Module:
    nets = [nn.Linear(FEATURES, num_classes) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(nets)

    def forward(net: Any, x: Tensor) -> Any:
        each = torch.vmap(lambda w, b: nn.functional.linear(x, w, b))(net.weights["weight"], net.weights["bias"])
        return each.mean(0)

    return Around(forward, weights=nn.ParameterDict(stacked))


@network()
def gradient_in_the_forward(num_classes: int) -> nn.Module:
    """The output depends on a gradient in the forward pass, so the backward pass has a second derivative."""

    def forward(net: Any, x: Tensor) -> Any:
        with torch.enable_grad():
            code = net.first(x)
            (slope,) = torch.autograd.grad(net.energy(code).tanh().sum(), code, create_graph=True)
        return net.last(slope)

    return Around(forward, first=nn.Linear(FEATURES, 8), energy=nn.Linear(8, 3), last=nn.Linear(8, num_classes))


@network()
def fixed_point(num_classes: int) -> nn.Module:
    """A deep equilibrium layer: iterations without gradients, then one with gradients."""

    def middle(layer: nn.Module, x: Tensor) -> Any:
        state = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(5):
                state = (layer(state) / 2 + x).tanh()
        return (layer(state) / 2 + x).tanh()

    return _three(num_classes, middle)
