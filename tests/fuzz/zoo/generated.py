"""Networks generated from a seed: some blocks for one kind of data, each with some treatment."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from tests.fuzz.zoo.entry import FEATURES, NUM_CLASSES, Entry, images, in_format, steps
from tests.fuzz.zoo.layers import Attention

WIDTHS = {"rows": FEATURES, "images": 3, "steps": 12}


class Block(nn.Module):
    """Layers that keep the shape of their input, applied several times, optionally as activation checkpoints."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.times = layers, 1
        self.reentrant: bool | None = None
        self.cast: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            if self.reentrant is None:
                x = x + self._once(x)
            else:
                x = x + checkpoint(self._once, x, use_reentrant=self.reentrant)
        return x

    def _once(self, x: Tensor) -> Any:
        return self.layers(x if self.cast is None else x.to(self.cast)).to(x.dtype)


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0]


def _activation(draw: random.Random) -> nn.Module:
    return draw.choice([nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.ELU(inplace=True), nn.PReLU()])


def _dense(draw: random.Random, width: int) -> nn.Module:
    norm = draw.choice([nn.Identity, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm1d])
    return nn.Sequential(nn.Linear(width, width, bias=draw.random() < 0.7), norm(width), _activation(draw))


def _conv(draw: random.Random, width: int) -> nn.Module:
    norm = draw.choice([nn.Identity(), nn.GroupNorm(1, width), nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
    side, groups = draw.choice([1, 3, 5]), draw.choice([1, width])
    conv = nn.Conv2d(width, width, side, padding=side // 2, groups=groups)
    return nn.Sequential(conv, norm, _activation(draw))


def _sequence(draw: random.Random, width: int) -> nn.Module:
    feed_forward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GLU())
    return draw.choice([Attention(width), Recurrent(width), feed_forward])


BLOCKS: dict[str, Callable[[random.Random, int], nn.Module]] = {"rows": _dense, "images": _conv, "steps": _sequence}


class Composite(nn.Module):
    """A first layer that sets the width, blocks, and a head."""

    def __init__(self, draw: random.Random, num_classes: int) -> None:
        super().__init__()
        self.kind = draw.choice(list(BLOCKS))
        width = draw.choice([6, 9, 12])
        self.fold = {"rows": nn.Identity, "images": images, "steps": steps}[self.kind]()
        first, channels = WIDTHS[self.kind], draw.choice([1, 3])
        self.first = nn.Conv2d(first, width, channels) if self.kind == "images" else nn.Linear(first, width)
        blocks = [Block(BLOCKS[self.kind](draw, width)) for _ in range(draw.randint(1, 4))]
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(width, num_classes)
        self.spare = nn.ParameterList()

    def forward(self, x: Tensor) -> Any:
        x = self.first(self.fold(x))
        for block in self.blocks:
            x = block(x)
        pooled = {"rows": lambda: x, "images": lambda: x.mean((2, 3)), "steps": lambda: x.mean(1)}[self.kind]()
        return self.head(pooled) + sum(parameter.sum() for parameter in self.spare)


# --- treatments ------------------------------------------------------------------------------------


def _weights(net: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Return the layers with a separate weight."""
    kinds = (nn.Linear, nn.Conv2d)
    return [layer for layer in net.modules() if isinstance(layer, kinds) and "weight" in layer._parameters]


def _blocks(net: Composite) -> list[Block]:
    return [block for block in net.blocks if isinstance(block, Block)]


def _without_norm(net: Composite) -> list[Block]:
    norm = nn.modules.batchnorm._BatchNorm
    return [block for block in _blocks(net) if not any(isinstance(m, norm) for m in block.modules())]


def slice_weight(draw: random.Random, net: Composite) -> None:
    for layer in draw.sample(_weights(net), 1):
        shape = list(layer.weight.shape)
        place = draw.randrange(len(shape))
        larger = torch.zeros([size * (1 + (k == place)) for k, size in enumerate(shape)])
        part = larger.narrow(place, 0, shape[place]) if draw.random() < 0.5 else larger.unfold(place, 1, 2).squeeze(-1)
        part.copy_(layer.weight.detach())
        layer.weight = nn.Parameter(part)


def transpose_weight(draw: random.Random, net: Composite) -> None:
    for layer in draw.sample(_weights(net), 1):
        layer.weight = nn.Parameter(layer.weight.detach().transpose(0, -1).contiguous().transpose(0, -1))


def freeze_some(draw: random.Random, net: Composite) -> None:
    for parameter in list(net.blocks.parameters()):
        parameter.requires_grad_(draw.random() < 0.6)


def tie_weights(draw: random.Random, net: Composite) -> None:
    layers = [layer for block in net.blocks for layer in _weights(block)]
    for one, other in itertools.pairwise(layers):
        if one.weight.shape == other.weight.shape:
            other.weight = one.weight


def share_a_block(draw: random.Random, net: Composite) -> None:
    """Use one block in two places. It must not have a norm, because a norm in two places is rejected."""
    net.blocks.extend(_without_norm(net)[:1])


def normalize_weight(draw: random.Random, net: Composite) -> None:
    for layer in draw.sample(_weights(net), 1):
        parametrizations.weight_norm(layer)


def prune_weight(draw: random.Random, net: Composite) -> None:
    for layer in draw.sample(_weights(net), 1):
        prune.random_unstructured(layer, "weight", 0.5)


def repeat_blocks(draw: random.Random, net: Composite) -> None:
    for block in _without_norm(net):
        block.times = draw.randint(1, 3)


def checkpoint_blocks(draw: random.Random, net: Composite) -> None:
    for block in _blocks(net):
        block.reentrant = draw.choice([None, False, True])


def hook_gradients(draw: random.Random, net: Composite) -> None:
    for parameter in draw.sample(list(net.parameters()), 2):
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * 0.5)


def odd_parameters(draw: random.Random, net: Composite) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (1, 1), (2, 0, 3)]
    net.spare.extend(nn.Parameter(torch.full(shape, 0.1)) for shape in draw.sample(shapes, 3))


def unreached_layer(draw: random.Random, net: Composite) -> None:
    net.unused = nn.Linear(3, 3)


def channels_last(draw: random.Random, net: Composite) -> None:
    in_format(net, torch.channels_last)


def cast_a_block(draw: random.Random, net: Composite) -> None:
    block = _blocks(net)[-1]
    block.cast = torch.float64
    block.to(torch.float64)


TREATMENTS = (
    slice_weight, transpose_weight, freeze_some, normalize_weight, prune_weight, tie_weights, share_a_block,
    repeat_blocks, checkpoint_blocks, hook_gradients, odd_parameters, unreached_layer, channels_last, cast_a_block,
)  # fmt: skip
"""Treatments in the order in which they are applied."""


def composite(num_classes: int = NUM_CLASSES, seed: int = 0) -> nn.Module:
    """Return the network of a seed."""
    draw = random.Random(seed)  # noqa: S311
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Composite(draw, num_classes)
        for treatment in sorted(draw.sample(TREATMENTS, draw.randint(1, 3)), key=TREATMENTS.index):
            treatment(draw, net)
    return net


def variation(seed: int) -> Entry:
    """Return the entry of a seed. All of them train as in torch."""
    optim: Any = random.Random(-1 - seed).choice(["sgd", "sgd", "adam", "adamw", "lars"])  # noqa: S311
    entry = Entry(f"{__name__}:composite", composite, optim=optim, arguments={"seed": seed})
    return dataclasses.replace(entry, quick=False)
