"""The networks' names, and the keys of `[model]` that each network uses: known without importing torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal


@dataclass(frozen=True)
class ModelFamily:
    """Networks of one design."""

    shown: str
    """Its name in lists."""
    pattern: str
    """Regular expression of its names; the groups are whole numbers."""
    keys: frozenset[str]
    """Keys of `[model]` that the network is built from, besides its name."""
    accepts: Literal["images", "rows", "both"]
    """Samples that the network accepts."""
    least_pixels: int = 1
    """Shortest side of an image that leaves at least one pixel in the last feature map."""
    numbers: tuple[str, ...] = ()
    """Names of the pattern's groups."""
    depths: tuple[int, ...] = ()
    """Valid depths; empty: the name has no depth."""


NORM_KEYS = frozenset({"ghost_batch", "bn_momentum"})

FAMILIES: dict[str, ModelFamily] = {
    "small_conv_net": ModelFamily("small_conv_net", "small_conv_net", NORM_KEYS | {"channels"}, "images"),
    "wrn": ModelFamily(
        "wrn_D_K of depth D = 6n+4",
        r"wrn_([1-9]\d*)_([1-9]\d*)",
        NORM_KEYS | {"dropout"},
        "images",
        numbers=("depth", "widening"),
        depths=tuple(range(10, 1007, 6)),
    ),
    "resnet": ModelFamily(
        "resnetD of depth D = 6n+2",
        r"resnet([1-9]\d*)",
        NORM_KEYS,
        "images",
        numbers=("depth",),
        # 50 and 152 have this form too, but they are the depths of ImageNet's networks.
        depths=tuple(depth for depth in range(8, 1203, 6) if depth not in {50, 152}),
    ),
    "vgg": ModelFamily(
        "vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn",
        r"vgg([1-9]\d*)_bn",
        NORM_KEYS,
        "images",
        least_pixels=32,  # halved five times
        numbers=("depth",),
        depths=(11, 13, 16, 19),
    ),
    # ⌊(29-1)/4⌋+1 = 8 after the first convolution, then halved three times
    "alexnet": ModelFamily("alexnet", "alexnet", frozenset(), "images", least_pixels=29),
    "dense7": ModelFamily("dense7", "dense7", NORM_KEYS | {"channels", "dropout"}, "rows"),
    "own": ModelFamily(
        "your own module:name, or one of torchvision or timm",
        r"[A-Za-z_][\w.]*:[A-Za-z_]\w*",
        NORM_KEYS | {"kwargs"},
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
"""Short names of networks of other packages, and the full names to write instead."""


@dataclass(frozen=True)
class ParsedModelName:
    """The parts of a network's name."""

    family: str
    """Key of FAMILIES."""
    numbers: tuple[int, ...]
    """Values of the family's `numbers`; empty for a user's network."""


def read_name(name: str) -> ParsedModelName:
    """Split a network's name into its family and its numbers.

    Raises:
        ValueError: no network has this name; the message suggests the nearest names.
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
    """Return the name. Raises ValueError, as `read_name` does, if no network has it."""
    read_name(name)
    return name


def _depth_fault(name: str, depth: int, family: ModelFamily) -> str:
    below, above = ([d for d in family.depths if d < depth][-1:], [d for d in family.depths if d > depth][:1])
    near = [name.replace(str(depth), str(d), 1) for d in (*below, *above)]
    elsewhere = f"; for ImageNet use {_ELSEWHERE[name]!r}" if name in _ELSEWHERE else ""
    return f"must be {family.shown}, nearest: {', '.join(near)}{elsewhere}"
