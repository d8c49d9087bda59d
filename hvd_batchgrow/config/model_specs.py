"""What the program knows of a network before it builds one: a spec per design, from its file in `nn/networks`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from hvd_batchgrow.config.own_code import MODULE_NAME, is_module_name
from hvd_batchgrow.config.registry import Registry
from hvd_batchgrow.messages.errors import Fault

if TYPE_CHECKING:  # it imports this file
    from hvd_batchgrow.config import ModelSection

NORM_KEYS = frozenset({"ghost_batch", "bn_momentum"})
"""Keys that a network with ghost norms is built from."""


@dataclass(frozen=True)
class ModelSpec:
    """Networks of one design."""

    name: str
    """Value of `model.name`, with capital letters for its numbers: wrn_D_K."""
    doc: str
    """What it is, in the table of docs/job-file.md."""
    keys: frozenset[str]
    """Keys of `[model]` that the network is built from, besides its name."""
    accepts: Literal["images", "rows", "both"]
    """Samples that the network accepts."""
    build: Callable[..., Any] | None
    """Returns the network for the channels or features of a sample, the number of classes, the numbers in the name and
    the values of `keys`; keys whose value is None are not passed. It imports torch, which takes seconds. None: the
    name is a callable of the user."""
    pattern: str = ""
    """Regular expression of the names, whose named groups are whole numbers; empty: `name` is the only one."""
    depths: tuple[int, ...] = ()
    """Valid values of the group `depth`; empty: the name has no depth."""
    listing: str = ""
    """How lists show it; empty: by its name."""
    examples: tuple[str, ...] = ()
    """Names to suggest for similar ones; empty: `name`."""
    least_pixels: int = 1
    """Shortest side of an image that leaves at least one pixel in the last feature map."""
    faults: Callable[[ModelSection], Iterable[Fault]] = lambda model: ()
    """Returns the faults of a section that only this design has."""

    def __str__(self) -> str:
        return self.listing or self.name


MODELS = Registry[ModelSpec]("hvd_batchgrow.nn.networks")
OWN = ModelSpec(
    name="module:name",
    doc="the return value of a callable: your own, torchvision's or timm's",
    keys=NORM_KEYS | {"kwargs"},
    accepts="both",
    build=None,
    pattern=MODULE_NAME,
    listing="your own module:name, or one of torchvision or timm",
)
_ELSEWHERE = {f"resnet{depth}": f"torchvision.models:resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {
    "inception_resnet_v2": "timm.models:inception_resnet_v2"
}
"""Short names of networks of other packages, and the full names to write instead."""


def all_models() -> list[ModelSpec]:
    """Return the specs of all networks, `OWN` last."""
    return [*MODELS.specs(), OWN]


def read_name(name: str) -> tuple[ModelSpec, dict[str, int]]:
    """Return the spec of a network's name, and the numbers in the name.

    Raises:
        ValueError: no network has this name; the message suggests the nearest names.
    """
    is_module_name(name)  # raises ValueError for a file
    for spec in all_models():
        if found := re.fullmatch(spec.pattern or spec.name, name):
            numbers = {group: int(text) for group, text in found.groupdict().items()}
            if spec.depths and numbers["depth"] not in spec.depths:
                raise ValueError(_depth_fault(name, numbers["depth"], spec))
            return spec, numbers
    examples = [example for spec in MODELS.specs() for example in spec.examples or (spec.name,)]
    near = get_close_matches(name, (*examples, *_ELSEWHERE), n=1, cutoff=0.5)
    hint = f"did you mean {_ELSEWHERE.get(near[0], near[0])!r}? " if near else ""
    raise ValueError(f"{hint}one of {', '.join(map(str, all_models()))}")


def check_name(name: str) -> str:
    """Return the name. Raises ValueError, as `read_name` does, if no network has it."""
    read_name(name)
    return name


def _depth_fault(name: str, depth: int, spec: ModelSpec) -> str:
    below, above = ([d for d in spec.depths if d < depth][-1:], [d for d in spec.depths if d > depth][:1])
    near = [name.replace(str(depth), str(d), 1) for d in (*below, *above)]
    elsewhere = f"; for ImageNet use {_ELSEWHERE[name]!r}" if name in _ELSEWHERE else ""
    return f"must be {spec}, nearest: {', '.join(near)}{elsewhere}"
