"""Versions of the packages that decide what a run computes."""

from __future__ import annotations

from functools import cache
from importlib import metadata

_PACKAGES = (
    *("hvd_batchgrow", "torch", "torchvision", "timm", "horovod", "mpi4py", "nvidia-dali-cuda130"),
    *("nvidia-dali-cuda120", "numpy", "pillow", "pyarrow"),
)


def installed_versions() -> dict[str, str]:
    """Return the versions of those packages that are installed, by name."""
    versions = {name: installed_version(name) for name in _PACKAGES}
    return {name: version for name, version in versions.items() if version is not None}


@cache
def installed_version(name: str) -> str | None:
    """Return the version of a package, None if it is not installed; parsing the metadata of all takes 20 ms."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
