"""The files of the user's code that a run has imported, which may be in no git checkout."""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hvd_batchgrow
from hvd_batchgrow.storage.strict_json import dump_json

_NAMED = re.compile(r'"([A-Za-z_]\w*)[\w.]*:[A-Za-z_]\w*"')
"""`module:name` in a job."""
_INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed packages, which may be in the user's home."""


def user_code(job: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each imported file of the user's code, by its path in the working directory or whole path.

    It includes the packages that the job names as `module:name` and modules in the working directory, without
    installed packages, whose versions are on record.

    Args:
        job: the job file.
    """
    here, named = Path.cwd(), {*_NAMED.findall(dump_json(job))}
    others = (Path(hvd_batchgrow.__file__).parent, Path(sysconfig.get_path("stdlib")))
    found = {}
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        is_installed = not _INSTALLED.isdisjoint(file.parts) or any(map(file.is_relative_to, others))
        is_here = file.is_relative_to(here)
        if file.is_file() and not is_installed and (is_here or name.partition(".")[0] in named):
            path = file.relative_to(here) if is_here else file
            found[str(path)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return dict(sorted(found.items()))
