"""What a run trains on: the device with its driver and libraries, and the library that sums gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hvd_batchgrow.comm.ranks import Ranks, version_text

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""Written by NVIDIA's kernel module; containers see it too."""


@dataclass(frozen=True)
class Hardware:
    """The devices and libraries of a run, as its start and `record.json` name them."""

    device: str
    """Name of this rank's GPU, or the CPU with torch's kernels for it."""
    gpus_per_host: tuple[int, ...]
    """Number of GPUs that the ranks of each host use; 0 on the CPU."""
    collectives: str
    """Library that sums gradients, and NCCL's version; empty for a single process."""
    cuda: str | None = None
    """Version of CUDA that torch is built for; None on the CPU. The following ones likewise."""
    cudnn: str | None = None
    driver: str | None = None
    """Version of the driver; None also if its kernel module does not publish it, as under WSL."""
    driver_cuda: str | None = None
    """Newest CUDA that the driver supports."""

    @property
    def is_cuda(self) -> bool:
        """Whether the ranks use GPUs."""
        return self.cuda is not None


def hardware_of(ranks: Ranks, device: torch.device, gpus_per_host: Sequence[int] = (0,)) -> Hardware:
    """Describe a rank's device and backend.

    Args:
        ranks: after `take_device`, which chooses the library of the collectives.
        device: of this rank.
        gpus_per_host: `Placement.gpus_per_host`.
    """
    hosts = tuple(gpus_per_host)
    if device.type != "cuda":
        return Hardware(_cpu() if device.type == "cpu" else str(device), hosts, ranks.collectives)
    library = f"NCCL {ranks.nccl_version()}" if ranks.collectives == "NCCL" else ranks.collectives
    cudnn = torch.backends.cudnn.version()
    return Hardware(
        torch.cuda.get_device_name(device),
        hosts,
        library,
        torch.version.cuda,
        version_text(cudnn) if cudnn else None,
        driver_version(),
        newest_cuda_of_driver(),
    )


def _cpu() -> str:
    """Return the name of torch's CPU kernels, and why no GPU is used unless a notice of `take_device` says so."""
    kernels = f"CPU ({torch.backends.cpu.get_cpu_capability()} kernels)"
    if torch.version.cuda is None:
        return f"{kernels}; torch {torch.__version__} is a CPU build"
    return kernels if torch.cuda.is_available() else f"{kernels}; torch {torch.__version__} sees no GPU"


def driver_version() -> str | None:
    """Return the version of NVIDIA's kernel module; None if it is not loaded, or does not publish its version."""
    try:
        found = re.search(r"NVRM version:.*?\s(\d+\.\d[\d.]*)\s", _DRIVER_FILE.read_text())
    except OSError:
        return None
    return found[1] if found else None


def newest_cuda_of_driver() -> str:
    """Return the newest version of CUDA that the driver supports; needs a CUDA build of torch."""
    number: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 13000 for 13.0
    return f"{number // 1000}.{number % 1000 // 10}"
