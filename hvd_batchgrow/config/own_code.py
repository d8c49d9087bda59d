"""Names of the user's own code in a job file: `module:name`."""

from __future__ import annotations

import re

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
