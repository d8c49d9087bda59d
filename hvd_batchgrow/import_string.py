"""Import the user's code, which a job file names as `module:name`."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.wording import with_article
from hvd_batchgrow.torchvision_shim import repair_torchvision

_MOST_CHARACTERS = 300


class NotFound(ValueError):  # noqa: N818  # the name says what is wrong
    """The callable does not exist; the message says why and suggests the nearest name."""


def find_callable(name: str) -> Callable[..., Any]:
    """Return the callable `module:name`. Modules are also searched in the working directory.

    The user's module may import torchvision, at any time, also with a CPU build of torch.

    Raises:
        NotFound: the module cannot be imported (its error is the cause), or does not have the callable.
    """
    module_name, _, attribute = name.partition(":")
    repair_torchvision()
    # At the end of the path, so that it hides no module; and permanently, for what the user's code imports later.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's own code
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        searched = f"; looked for in the working directory {Path.cwd()} and on Python's path" if missing else ""
        raise NotFound(f"{name} cannot be imported: {describe_error(error)}{searched}") from error
    found = getattr(module, attribute, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    near = get_close_matches(attribute, [key for key, value in vars(module).items() if callable(value)], n=1)
    hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
    fault = (
        "does not define it"
        if found is None
        else f"defines it as {with_article(type(found).__name__)}, which is not callable"
    )
    raise NotFound(f"{name}: {module_name} {fault}{hint}")


def describe_error(error: BaseException) -> str:
    """Return an error and where it was raised, preferably in the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    torch = find_spec("torch")
    files = (importlib.__file__, __file__, *([torch.origin] if torch and torch.origin else []))
    between = tuple(str(Path(file).parent) for file in files)
    outside = [frame for frame in frames if not frame.filename.startswith((*between, "<frozen"))]
    place = f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {_in_one_line(str(error))}{place}"


def _in_one_line(text: str) -> str:
    """Return a message without line breaks, shortened if it is long: some of torch's list every possible value."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _MOST_CHARACTERS else f"{joined[:_MOST_CHARACTERS]} …"
