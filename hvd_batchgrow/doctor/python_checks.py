"""Checks of Python, of this package and of the packages of its extras."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import hvd_batchgrow
from hvd_batchgrow.doctor.check import Check, Facts, fail, note, ok
from hvd_batchgrow.doctor.gather import facts_of
from hvd_batchgrow.train.run.versions import installed_version

OLDEST_PYTHON = (3, 11)
_OTHER_EXTRAS = ("mpi", "horovod", "dali-cuda120", "dali-cuda130", "dev")
"""Extras that other checks cover, or that only developers need."""


def python_facts() -> Facts:
    """Return version and path of this Python."""
    return {"version": list(sys.version_info[:3]), "path": sys.executable}


def package_facts() -> Facts:
    """Return the version of this package, where it is, and the packages of its extras with their versions."""
    try:
        requirements = metadata.requires("hvd_batchgrow") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        requirements = None
    return {
        "version": hvd_batchgrow.__version__,
        "folder": str(Path(hvd_batchgrow.__file__).parent),
        "extras": None if requirements is None else _extras(requirements),
    }


def _extras(requirements: list[str]) -> dict[str, dict[str, str | None]]:
    found: dict[str, dict[str, str | None]] = defaultdict(dict)
    for text in requirements:
        match = re.match(r"""([A-Za-z0-9_.-]+).*;\s*extra == ["']([^"']+)["']""", text)
        if match and match[2] not in _OTHER_EXTRAS:
            found[match[2]][match[1]] = installed_version(match[1])
    return dict(found)


def check_python(facts: Mapping[str, Facts]) -> Check:
    """Check the version of Python."""
    python = facts_of(facts, "python")
    version = ".".join(map(str, python["version"]))
    found = f"{version}, {python['path']}"
    if tuple(python["version"]) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return fail("Python", f"{found}; {oldest} or newer is needed", f"PYTHON=python{oldest} make setup")
    return ok("Python", found)


def check_package(facts: Mapping[str, Facts]) -> Check:
    """Check that this package is installed."""
    package = facts_of(facts, "package")
    found = f"{package['version']}, {package['folder']}"
    if package["extras"] is None:
        return note("hvd_batchgrow", f"{found}; this folder is not installed as a package", "pip install -e .")
    return ok("hvd_batchgrow", found)


def check_ghost_norms(facts: Mapping[str, Facts]) -> Check:
    """Check the C library of ghost norms."""
    name, library = "ghost norms", facts_of(facts, "ghost_norms")
    slower = "on a CPU, ghost batch norm uses PyTorch's operations, which are slower"
    remedy = "install a C compiler (sudo apt-get install g++), then: pip install --force-reinstall --no-deps -e ."
    if library.get("is_missing"):
        return note(name, "not checked, because torch is not installed")
    if not library.get("is_built", True):
        return note(name, f"the C library is not built: {slower}", remedy)
    if "error" in library:
        return fail(name, f"the C library does not work: {library['error']}", remedy)
    if not library["largest_difference"] < 1e-4:
        difference = f"the C library differs from PyTorch's operations by {library['largest_difference']:.3g}"
        return fail(name, f"{difference}, which is more than rounding", remedy)
    return ok(name, f"the C library works (it differs from PyTorch by {library['largest_difference']:.1g})")


def check_extras(facts: Mapping[str, Facts]) -> list[Check]:
    """Check the packages of each extra of this package."""
    checks = []
    for extra, packages in (facts_of(facts, "package")["extras"] or {}).items():
        name = f"extra {extra}"
        versions = [f"{package} {version}" for package, version in packages.items() if version]
        absent = [package for package, version in packages.items() if not version]
        found = ", ".join([*versions, *(f"{package} is not installed" for package in absent)])
        remedy = f"pip install 'hvd_batchgrow[{extra}]'"
        checks.append(note(name, found, remedy) if absent else ok(name, found))
    return checks
