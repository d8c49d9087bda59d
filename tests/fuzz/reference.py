"""The reference result of a job on a network of the zoo, by plain torch.

Of this package, only the order of the samples is used. The network is not converted: its batch norms are torch's,
called for one ghost batch after the other. `backward` accumulates the gradients, and torch's optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from hvd_batchgrow.data.order.stream import Stream
from tests.fuzz.zoo.entry import FEATURES, NUM_CLASSES, Entry

GHOST, NUM_SAMPLES, SEED = 4, 64, 7
BATCHES = (8, 8, 8, 8, 16, 16)
"""B of each update: one epoch. The batch doubles in the middle of it."""
MOMENTUM, DECAY, BETA2, EPS, TRUST, GHOST_MOMENTUM = 0.9, 0.01, 0.999, 1e-8, 0.02, 0.1
LR = {"sgd": 0.05, "adam": 2e-3, "adamw": 2e-3, "lars": 0.5}

State = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a batch is divided."""

    ranks: int = 1
    groups: int = 4
    """Most ghost batches of a micro-batch."""
    exact: bool = False
    resumed: bool = False
    """Whether the run is stopped after 3 updates and resumed."""

    def __str__(self) -> str:
        words = [f"{self.ranks}x{self.groups}", *["exact"] * self.exact, *["resumed"] * self.resumed]
        return " ".join(words)

    def passes(self, num_ghost_batches: int) -> list[list[int]]:
        """Return the ghost batches of each micro-batch, rank by rank."""
        shares = [list(range(rank, num_ghost_batches, self.ranks)) for rank in range(self.ranks)]
        return [share[i : i + self.groups] for share in shares for i in range(0, len(share), self.groups)]


def rows() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the training set: noisy prototypes of the classes."""
    draw = np.random.default_rng(3)
    labels = draw.integers(0, NUM_CLASSES, NUM_SAMPLES)
    prototypes = draw.normal(size=(NUM_CLASSES, FEATURES))
    return (prototypes[labels] * 0.5 + draw.normal(size=(NUM_SAMPLES, FEATURES))).astype(np.float32), labels


def reference(entry: Entry, layout: Layout, nudge: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Module:
    """Return the network after all updates.

    Args:
        entry: creates the network, and gives the order of its samples.
        layout: divides the batch as in the job.
        nudge: changes the inputs, to measure the effect of a small change.
    """
    network = entry.make(NUM_CLASSES, **entry.arguments)
    _initialize_lazy(network)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.eps = module.eps or 1e-30  # torch refuses 0; 1e-30 does not change any variance of the zoo
            module.forward = partial(_by_ghost_batch, module, module.forward)  # type: ignore[method-assign]
    optimizer = _optimizer(entry, network)
    features, labels = (torch.from_numpy(values) for values in rows())
    order, samples = torch.from_numpy(Stream(NUM_SAMPLES, SEED).ids(0, NUM_SAMPLES)), 0
    network.train()
    for batch in BATCHES:
        groups = order[samples : samples + batch].split(GHOST)
        kept: State = {}
        for places in _served(entry, layout, len(groups)):
            before = _own_buffers(network) if entry.order == "first" else {}
            ids = torch.cat([groups[k] for k in places])
            logits = network(nudge(features[ids].clone()).to(entry.inputs))
            loss = nn.functional.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[ids], reduction="sum"
            )
            (loss / batch).backward()
            kept = _own_buffers(network) if 0 in places and before else kept
            _restore(network, before)
        _restore(network, kept)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        samples += batch
    return network


def limits(entry: Entry, layout: Layout, expected: State) -> dict[str, float]:
    """Return the largest difference that rounding may cause in each tensor, measured on this network.

    The inputs are changed by up to one unit in the last place of the coarsest type in the network. The limit is 60
    times the resulting change, plus 16 units in the last place of the tensor's largest value: sums in another
    order round several times.
    """
    types = [value.dtype for value in expected.values()] + ([entry.coarse] if entry.coarse else [])
    unit = max(map(_unit, types), default=2.0**-24)
    draw = torch.Generator().manual_seed(0)
    moved = tensors(reference(entry, layout, lambda x: x * (1 + unit * torch.randint(-1, 2, x.shape, generator=draw))))
    growth = {name: distance(value, moved[name]) for name, value in expected.items()}
    return {
        name: 60 * growth[name] + 16 * _unit(value.dtype) * (float(_wide(value).abs().max()) if value.numel() else 0.0)
        for name, value in expected.items()
    }


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers, including buffers that are not in `state_dict`."""
    state = network.state_dict() | dict(network.named_buffers())
    copies = {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}
    return without_extra(copies)


def without_extra(values: State) -> State:
    """Return the values without torch's counts of batches, which ghost norms do not have, and without extra state."""
    return {name: value for name, value in values.items() if not name.endswith(("num_batches_tracked", "_extra_state"))}


def extra_state(network: nn.Module) -> State:
    """Return the extra state of the modules of a network, by name."""
    return {name: value for name, value in network.state_dict().items() if name.endswith("_extra_state")}


def distance(first: Tensor, second: Tensor) -> float:
    """Return the largest difference of two entries; infinity for different shapes or types, or if it is NaN."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return float("inf")
    if not first.numel():
        return 0.0
    gap = float((_wide(first) - _wide(second)).abs().max())
    return float("inf") if math.isnan(gap) else gap


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _initialize_lazy(network: nn.Module) -> None:
    if any(is_lazy(parameter) for parameter in network.parameters()):
        with torch.no_grad():
            network.eval()(torch.zeros(2, FEATURES))


def _by_ghost_batch(norm: _BatchNorm, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not norm.training:
        return forward(x)
    # An activation checkpoint repeats the forward: the statistics must not count its samples twice.
    norm.momentum = 0.0 if torch._C._current_graph_task_id() != -1 else GHOST_MOMENTUM
    return torch.cat([forward(part) for part in x.split(GHOST)])


def _served(entry: Entry, layout: Layout, num_ghost_batches: int) -> list[list[int]]:
    return [[k] for k in range(num_ghost_batches)] if entry.order == "stream" else layout.passes(num_ghost_batches)


def _own_buffers(network: nn.Module) -> State:
    """Return copies of all buffers except those of batch norms."""
    return {
        f"{path}.{name}".lstrip("."): buffer.clone()
        for path, module in network.named_modules()
        if not isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    }


def _restore(network: nn.Module, values: State) -> None:
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        setattr(network.get_submodule(path), last, value.clone())


def _optimizer(entry: Entry, network: nn.Module) -> Any:
    parameters = list(network.parameters())
    parameters = [p for p in parameters if p.is_floating_point() or p.is_complex()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = LR[entry.optim]
    if entry.optim == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)
    if entry.optim == "lars":
        return PlainLars(parameters, lr)
    kind = torch.optim.Adam if entry.optim == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, betas=(MOMENTUM, BETA2), eps=EPS)


class PlainLars:
    """λ = η |w| / (|g| + β |w|), u ← m u + λ (g + β w), w ← w - ε u; without λ and decay below 2 dimensions."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self.parameters, self.lr = parameters, lr
        self.buffers: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        for weight in self.parameters:
            if weight.grad is None:
                continue
            push = weight.grad
            if weight.ndim > 1:
                of_weight, of_gradient = float(weight.norm()), float(push.norm())
                ratio = TRUST * of_weight / (of_gradient + DECAY * of_weight) if of_weight * of_gradient else 1.0
                push = ratio * (push + DECAY * weight)
            self.buffers[weight] = MOMENTUM * self.buffers[weight] + push if weight in self.buffers else push.clone()
            weight.sub_(self.lr * self.buffers[weight])

    def zero_grad(self, set_to_none: bool) -> None:
        assert set_to_none
        for weight in self.parameters:
            weight.grad = None
