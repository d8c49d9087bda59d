"""Versions of the packages that decide what a run computes."""

from __future__ import annotations

from importlib import metadata

_PACKAGES = (
    *("hvd_batchgrow", "torch", "torchvision", "timm", "horovod", "mpi4py", "nvidia-dali-cuda130"),
    *("nvidia-dali-cuda120", "numpy", "pillow", "pyarrow"),
)


def installed_versions() -> dict[str, str]:
    """Return the versions of those packages that are installed, by name."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
