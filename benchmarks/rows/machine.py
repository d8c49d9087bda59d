"""Facts about the machine, as JSON: python -m benchmarks.rows.machine. Of other packages, only torch is imported."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows.packages import is_installed, versions

_SHOWN = ("torchvision", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy", "pydantic", "pytest")


def facts() -> dict[str, Any]:
    """Return the facts; `no_gpu` says why torch cannot use a GPU and is empty if it can."""
    found: dict[str, Any] = {
        "host": platform.node(),
        "cpu": _processor(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(value, 1) for value in os.getloadavg()],
        "versions": dict(versions(_SHOWN)),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "torch": None,
        "cuda": None,
        "driver": None,
        "gpu": None,
    }
    if not is_installed("torch"):
        return found | {"no_gpu": "torch is not installed"}
    import torch

    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        build = "is a CPU build" if torch.version.cuda is None else "finds no GPU (nvidia-smi lists those that work)"
        return found | {"no_gpu": f"torch {torch.__version__} {build}"}
    gpu = torch.cuda.get_device_properties(0)
    busy = _output("nvidia-smi", "--query-gpu=driver_version,utilization.gpu,memory.used", "--format=csv,noheader")
    return found | {
        "no_gpu": "",
        "gpu": gpu.name,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "driver": busy.partition(",")[0] or None,
        "gpu_use": busy.splitlines()[0].partition(",")[2].strip() if busy else None,
    }


def _processor() -> str:
    """Return the processor's name, or an empty text if the system does not say it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _output(*command: str) -> str:
    """Return what a program prints, or an empty text if there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    json.dump(facts(), sys.stdout)
