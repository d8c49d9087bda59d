"""Find parameters by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

_MOST_NEAR = 3


def names_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return all names of each parameter, in the order of `named_parameters`; a tied parameter has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Return whether a pattern matches one of the names of a parameter or module, or of a module that contains it.

    Args:
        pattern: in the syntax of `fnmatch`: `*` stands for any text, dots included, `?` for one character, and
            `[abc]` for one of these. Capital letters differ from small ones.
        names: dotted names, such as layer1.0.conv1.weight.
    """
    return any(fnmatchcase(path, pattern) for name in names for path in _paths(name))


def nearest(pattern: str, names: Sequence[str]) -> str:
    """Return `; nearest: layer1, layer2`: the names or modules most similar to a pattern that matches nothing."""
    paths = list(dict.fromkeys(path for name in names for path in _paths(name)))
    plain = pattern.strip("*.")
    near = get_close_matches(plain or pattern, paths, n=_MOST_NEAR, cutoff=0.5)
    if near:
        return f"; nearest: {', '.join(near)}"
    top = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return f"; the network consists of {', '.join(top[:8])}{', …' if top[8:] else ''}"


def _paths(name: str) -> Iterator[str]:
    """Yield a name and those of the modules around it, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))
