"""Code of the user's own, which a job file names as `module:name`."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MOST_CHARACTERS = 300


class NotFound(ValueError):  # noqa: N818  # what is the matter, not that something is
    """There is no such callable; `str` says why, with the nearest."""


def find_callable(name: str) -> Callable[..., Any]:
    """What `module:name` stands for; modules are also looked for in the working directory.

    Raises:
        NotFound: the module cannot be imported (then with its error as the cause), or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    # Last, and for good: what the user's modules import later is found too, and none of ours is hidden.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        searched = f"; looked for in the working directory {Path.cwd()} and on Python's path" if missing else ""
        raise NotFound(f"{name} cannot be imported: {describe_error(error)}{searched}") from error
    found = getattr(module, attribute, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    near = get_close_matches(attribute, [key for key, value in vars(module).items() if callable(value)], n=1)
    hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
    what = "has no such name" if found is None else f"has a {type(found).__name__} there, which cannot be called"
    raise NotFound(f"{name}: {module_name} {what}{hint}")


def describe_error(error: Exception) -> str:
    """An error and where it came from, as near to the user's own lines as can be told."""
    frames = traceback.extract_tb(error.__traceback__)
    torch = find_spec("torch")
    files = (importlib.__file__, __file__, *([torch.origin] if torch and torch.origin else []))
    between = tuple(str(Path(file).parent) for file in files)
    outside = [frame for frame in frames if not frame.filename.startswith((*between, "<frozen"))]
    place = f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {_in_one_line(str(error))}{place}"


def _in_one_line(text: str) -> str:
    """A message without line breaks, and without the end of one that lists all there is, as some of torch do."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _MOST_CHARACTERS else f"{joined[:_MOST_CHARACTERS]} …"
