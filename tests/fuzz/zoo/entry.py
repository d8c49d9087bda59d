"""A network of the zoo, and the expected result of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

FEATURES, NUM_CLASSES, SIDE = 108, 4, 6
"""A sample is a row of 3 · 6 · 6 numbers; networks for images reshape it."""

Make = Callable[..., nn.Module]
Order = Literal["stream", "layout", "first"]
Optim = Literal["sgd", "adam", "adamw", "lars"]


@dataclass(frozen=True)
class Entry:
    """A network and its expected outcome: unless `refused` or `stops` is set, it trains as in torch."""

    name: str
    """`module:function`, as in a job file."""
    make: Make
    refused: str = ""
    """Pattern of the one-line message with which it is rejected before training."""
    exact_refused: str = ""
    """The same for a job with layout.exact. In fast mode the network must be reported as a hazard."""
    named: str = ""
    """Pattern of a message that the run must print, in every layout that trains the network."""
    stops: str = ""
    """Pattern of the message with which a run ends early with exit code 1."""
    raises: bool = False
    """Whether the process then ends with an error, of the network or of a single rank."""
    order: Order = "stream"
    """What the reference passes to the network at a time, see `reference.py`: a ghost batch in the order of the
    stream; a micro-batch of the layout; or a ghost batch, each with the buffers from before the update."""
    compared: bool = True
    """False if the result depends on torch's random numbers, and so has no reference."""
    optim: Optim = "sgd"
    inputs: torch.dtype = torch.float32
    """Type of the inputs, which is that of all parameters."""
    coarse: torch.dtype | None = None
    """Least precise type of its computations; None: that of its tensors."""
    quick: bool = True
    """Whether the unit tests train it."""
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """Return a short name."""
        return self.name.rpartition(":")[2] + "".join(f" {key}={value}" for key, value in self.arguments.items())


ENTRIES: list[Entry] = []


def network(**expected: Any) -> Callable[[Make], Make]:
    """Register a function that builds a network. Its initial weights are drawn from a fixed seed."""

    def enter(make: Make) -> Make:
        @functools.wraps(make)
        def seeded(num_classes: int = NUM_CLASSES, **arguments: Any) -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                return make(num_classes, **arguments)

        # Plain layers are many and similar: `make fuzz` is enough for them.
        quick = expected.pop("quick", not make.__module__.endswith((".layers", ".norms", ".outputs")) or bool(expected))
        ENTRIES.append(Entry(f"{make.__module__}:{make.__name__}", seeded, quick=quick, **expected))
        return seeded

    return enter


def images() -> nn.Module:
    """Return a layer that reshapes a row to an image of 3 channels."""
    return nn.Unflatten(1, (3, SIDE, SIDE))


def steps() -> nn.Module:
    """Return a layer that reshapes a row to a sequence of 9 steps of 12 numbers."""
    return nn.Unflatten(1, (9, 12))


def dense_net(num_classes: int, width: int = 10) -> nn.Sequential:
    """Return a network of two layers without norm."""
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, num_classes))


def linear(net: nn.Sequential, place: int) -> nn.Linear:
    """Return a linear layer of a network."""
    layer = net[place]
    assert isinstance(layer, nn.Linear)
    return layer


def in_format(net: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Return the network with its weights in a memory format."""
    return net.to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]  # torch's types lack it


class Around(nn.Module):
    """A network whose forward is a function of its modules and parameters."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self._function = forward

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)
