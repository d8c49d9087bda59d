"""Names of the user's own code in a job file: `module:name`."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

MODULE_NAME = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def is_module_name(text: str) -> bool:
    """Return whether a text has the form `module:name`.

    Raises:
        ValueError: it is `FILE.py:name`; the message suggests the name of the module.
    """
    if found := re.fullmatch(r"(?:\./)?([\w./-]+)\.py:(\w+)", text):
        name = f"{found[1].replace('/', '.')}:{found[2]}"
        hint = f"did you mean {name!r}? " if re.fullmatch(MODULE_NAME, name) else ""
        raise ValueError(f"{hint}must be module:name, not FILE.py:name")
    return re.fullmatch(MODULE_NAME, text) is not None


def checked_name(name: str, known: Collection[str], own: str = "module:name") -> str:
    """Return the name. Raises ValueError if it is neither known nor `module:name`; the message suggests one.

    Args:
        name: from a job file.
        known: the names of this package.
        own: how the message writes the form of names of the user's own code.
    """
    if name in known or is_module_name(name):
        return name
    near = get_close_matches(name.lower(), known, n=1)
    if not near and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        near = [":".join(name.rsplit(".", 1))]
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{hint}one of {', '.join(known)}, or your own {own}")
