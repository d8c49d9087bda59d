"""One network of the zoo, and what a run of it must do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

FEATURES, NUM_CLASSES, SIDE = 108, 4, 6
"""A sample is a row of 3 · 6 · 6 numbers; networks for images fold it themselves."""

Make = Callable[..., nn.Module]
Order = Literal["stream", "layout", "first"]
Optim = Literal["sgd", "adam", "adamw", "lars"]


@dataclass(frozen=True)
class Entry:
    """A network and the outcome that is right for it; without `refused` and `stops`, it trains as in torch."""

    name: str
    """`module:function`, as a job file names it."""
    make: Make
    refused: str = ""
    """Pattern of the one line with which it is rejected before training."""
    exact_refused: str = ""
    """Likewise, for a job with layout.exact; then it must be named as a hazard in fast mode."""
    named: str = ""
    """Pattern of what the run must say of it, in every layout that trains it."""
    stops: str = ""
    """Pattern of the message with which a run ends early with exit code 1."""
    raises: bool = False
    """Whether that ends the process with an error: of the network itself, or of one rank alone."""
    order: Order = "stream"
    """What the reference gives the network at a time, see `reference.py`: a ghost batch in the order of the
    stream; what the layout gives it; or a ghost batch, each from the update's first buffers."""
    compared: bool = True
    """False: torch's own random numbers decide the result, which then has no reference."""
    optim: Optim = "sgd"
    inputs: torch.dtype = torch.float32
    """Type of the inputs, that of all its parameters."""
    coarse: torch.dtype | None = None
    """The type of least precision that it computes in; None: that of its tensors."""
    quick: bool = True
    """Whether the unit tests train it too."""
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """Short name, for a table."""
        return self.name.rpartition(":")[2] + "".join(f" {key}={value}" for key, value in self.arguments.items())


ENTRIES: list[Entry] = []


def network(**expected: Any) -> Callable[[Make], Make]:
    """Enter a function that builds a network; it draws its first weights from a seed of its own."""

    def enter(make: Make) -> Make:
        @functools.wraps(make)
        def seeded(num_classes: int = NUM_CLASSES, **arguments: Any) -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                return make(num_classes, **arguments)

        # Layers that are trained without further ado are many and alike: `make fuzz` is enough for those.
        quick = expected.pop("quick", not make.__module__.endswith((".layers", ".norms", ".outputs")) or bool(expected))
        ENTRIES.append(Entry(f"{make.__module__}:{make.__name__}", seeded, quick=quick, **expected))
        return seeded

    return enter


def images() -> nn.Module:
    """A row as an image of 3 channels."""
    return nn.Unflatten(1, (3, SIDE, SIDE))


def steps() -> nn.Module:
    """A row as a sequence of 9 steps of 12 numbers."""
    return nn.Unflatten(1, (9, 12))


def dense_net(num_classes: int, width: int = 10) -> nn.Sequential:
    """Two layers without any norm."""
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, num_classes))


class Around(nn.Module):
    """A network whose forward is a function of its modules and parameters."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self._function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)
