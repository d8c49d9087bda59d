"""What is known of the networks without building one: their names, and the keys of `[model]` that each uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from hvd_batchgrow.messages.errors import Fault

if TYPE_CHECKING:  # config checks its names with this file
    from hvd_batchgrow.config import ModelSection


@dataclass(frozen=True)
class ModelFamily:
    """Networks of one design."""

    shown: str
    """How lists name it."""
    pattern: str
    """Of the names; its groups are whole numbers."""
    keys: frozenset[str]
    """Keys of `[model]` that the network is built from, beside its name."""
    takes: Literal["images", "rows", "both"]
    least_pixels: int = 1
    """Shortest side of an image that leaves something of the last map."""
    numbers: tuple[str, ...] = ()
    """What the groups of the pattern are."""
    depths: tuple[int, ...] = ()
    """Depths that there are; empty: the design has one."""


_NORM = frozenset({"ghost_batch", "bn_momentum"})

FAMILIES: dict[str, ModelFamily] = {
    "small_conv_net": ModelFamily("small_conv_net", "small_conv_net", _NORM | {"channels"}, "images"),
    "wrn": ModelFamily(
        "wrn_D_K of depth D = 6n+4",
        r"wrn_([1-9]\d*)_([1-9]\d*)",
        _NORM | {"dropout"},
        "images",
        numbers=("depth", "widening"),
        depths=tuple(range(10, 1007, 6)),
    ),
    "resnet": ModelFamily(
        "resnetD of depth D = 6n+2",
        r"resnet([1-9]\d*)",
        _NORM,
        "images",
        numbers=("depth",),
        # 50 and 152 are of this form too, but known as other networks, ImageNet's.
        depths=tuple(depth for depth in range(8, 1203, 6) if depth not in {50, 152}),
    ),
    "vgg": ModelFamily(
        "vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn",
        r"vgg([1-9]\d*)_bn",
        _NORM,
        "images",
        least_pixels=32,  # five times halved
        numbers=("depth",),
        depths=(11, 13, 16, 19),
    ),
    # ⌊(29-1)/4⌋+1 = 8 after the first convolution, then three times halved
    "alexnet": ModelFamily("alexnet", "alexnet", frozenset(), "images", least_pixels=29),
    "dense7": ModelFamily("dense7", "dense7", _NORM | {"channels", "dropout"}, "rows"),
    "own": ModelFamily(
        "module:name of your own, torchvision or timm",
        r"[A-Za-z_][\w.]*:[A-Za-z_]\w*",
        _NORM | {"kwargs"},
        "both",
    ),
}

_EXAMPLES = (
    "small_conv_net",
    "wrn_16_4",
    "wrn_28_10",
    *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110)),
    *(f"vgg{depth}_bn" for depth in (11, 13, 16, 19)),
    "alexnet",
    "dense7",
)
_ELSEWHERE = {f"resnet{depth}": f"torchvision.models:resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {
    "inception_resnet_v2": "timm.models:inception_resnet_v2"
}
"""Names that people write for networks of other packages."""


@dataclass(frozen=True)
class ParsedModelName:
    """What a name says."""

    family: str
    """Key of FAMILIES."""
    numbers: tuple[int, ...]
    """As the family's `numbers` call them; empty for a network of the user's own."""


def read_name(name: str) -> ParsedModelName:
    """Take a name apart.

    Raises:
        ValueError: there is no such network; with the nearest that there are.
    """
    for key, family in FAMILIES.items():
        if found := re.fullmatch(family.pattern, name):
            numbers = tuple(map(int, found.groups()))
            if family.depths and numbers[0] not in family.depths:
                raise ValueError(_depth_fault(name, numbers[0], family))
            return ParsedModelName(key, numbers)
    near = get_close_matches(name, (*_EXAMPLES, *_ELSEWHERE), n=1, cutoff=0.5)
    hint = f"did you mean {_ELSEWHERE.get(near[0], near[0])!r}? " if near else ""
    raise ValueError(f"{hint}one of {', '.join(family.shown for family in FAMILIES.values())}")


def check_name(name: str) -> str:
    """The name, where there is such a network; raises ValueError as `read_name` does."""
    read_name(name)
    return name


def _depth_fault(name: str, depth: int, family: ModelFamily) -> str:
    below, above = ([d for d in family.depths if d < depth][-1:], [d for d in family.depths if d > depth][:1])
    near = [name.replace(str(depth), str(d), 1) for d in (*below, *above)]
    elsewhere = f"; ImageNet's is {_ELSEWHERE[name]!r}" if name in _ELSEWHERE else ""
    return f"there is {family.shown}, nearest: {', '.join(near)}{elsewhere}"


def check_network(model: ModelSection) -> list[Fault]:
    """All that is wrong with `[model]` as far as it can be told without the network.

    No key may be there that would be ignored. A key with its default value counts as not there, and
    `ghost_batch` is used by all: it is the unit that the stream is cut into.
    """
    try:
        family = FAMILIES[read_name(model.name).family]
    except ValueError as error:
        return [Fault("model.name", f"{error}, got {model.name!r}")]
    given = {key for key, field in type(model).model_fields.items() if getattr(model, key) != field.default}
    unused = sorted(given - _used(family))
    faults = [Fault(f"model.{key}", f"is not used by {model.name!r}, but by {_users(key)}") for key in unused]
    if model.name == "dense7" and model.channels and len(model.channels) != 6:
        widths = f"{len(model.channels)}: {list(model.channels)}"
        faults.append(Fault("model.channels", f"dense7 has six hidden layers, so six widths, not {widths}"))
    return faults


def _users(key: str) -> str:
    return ", ".join(family.shown for family in FAMILIES.values() if key in _used(family))


def _used(family: ModelFamily) -> set[str]:
    """Keys that say something of a network: what it is built from, and what is done with its norms."""
    return {"name", "ghost_batch", *family.keys, *({"precise_bn_samples"} if family.keys >= _NORM else ())}


def check_shape(model: ModelSection, shape: Sequence[int]) -> list[Fault]:
    """What keeps a network from taking samples of a shape, (H, W, C) or (features,)."""
    family = FAMILIES[read_name(model.name).family]
    kind = "images" if len(shape) == 3 else "rows"
    if family.takes not in {kind, "both"}:
        others = [other.shown for other in FAMILIES.values() if other.takes == kind]
        texts = {"images": "images (H, W, C)", "rows": "rows (features,)"}
        fault = f"{model.name!r} takes {texts[family.takes]}, the samples are {kind} {tuple(shape)}"
        return [Fault("model.name", f"{fault}; {kind} are for {', '.join(others)}")]
    if kind == "images" and min(shape[:2]) < family.least_pixels:
        pixels = f"{family.least_pixels} × {family.least_pixels}"
        return [Fault("model.name", f"{model.name!r} needs images of at least {pixels}, these are {tuple(shape)}")]
    return []
