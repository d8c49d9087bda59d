"""Import the user's code, which a job file names as `module:name`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from hvd_batchgrow.messages.errors import describe_error
from hvd_batchgrow.messages.wording import with_article
from hvd_batchgrow.torchvision_shim import repair_torchvision


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
    raise NotFound(f"{name}: {module_name} {fault}{hint}{_hidden(module_name, module)}")


def _hidden(module_name: str, module: ModuleType) -> str:
    """Return which file of the working directory a module hides that has the same name, or an empty text."""
    place, found = Path.cwd().joinpath(*module_name.split(".")), getattr(module, "__file__", None)
    files = [file for file in (place.with_name(f"{place.name}.py"), place / "__init__.py") if file.is_file()]
    if not files or (found and files[0].samefile(found)):
        return ""
    return f"; {files[0]} is hidden by {found or 'a built-in module'}, which has the same name: rename it"
