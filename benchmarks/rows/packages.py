"""Which packages are missing, and the command that installs them. Only Python's standard library is imported here."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_MODULES = {"nvidia-dali": "nvidia.dali", "pillow": "PIL", "protobuf": "google.protobuf", "pytest-xdist": "xdist"}
"""The module of a distribution, where it has another name."""


def module_of(name: str) -> str:
    """Return the name of the module of a distribution."""
    return _MODULES.get(name, name.replace("-", "_"))


def is_installed(name: str) -> bool:
    """Return whether the module of a distribution is there; it is not imported."""
    try:
        return find_spec(module_of(name)) is not None
    except (ImportError, ValueError):  # its package is missing, or is damaged
        return False


def missing(names: Iterable[str]) -> list[str]:
    """Return the distributions that are not installed, each once."""
    return [name for name in dict.fromkeys(names) if not is_installed(name)]


def requirements() -> dict[str, str]:
    """Return what pyproject.toml requires of each distribution, all extras included."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found: dict[str, str] = {}
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        assert name is not None
        found.setdefault(name[0], line)
    return found


def pip_line(names: Iterable[str], torch: str | None, cuda: str | None) -> str:
    """Return the command that installs distributions.

    Args:
        names: of the distributions.
        torch: the installed version, which must stay; None: torch is missing too.
        cuda: the version of CUDA for which torch is built; DALI needs the same major version.
    """
    required = requirements()
    dali = required["nvidia-dali-cuda120" if (cuda or "").startswith("12.") else "nvidia-dali-cuda130"]
    lines = [dali if name == "nvidia-dali" else required.get(name, name) for name in names]
    kept = [f"torch=={torch.partition('+')[0]}"] if torch else []  # torchvision would bring another torch
    return shlex.join(["python", "-m", "pip", "install", *lines, *kept])


def versions(names: Iterable[str]) -> Mapping[str, str]:
    """Return the versions of the installed ones among some distributions, and of DALI for any CUDA."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
