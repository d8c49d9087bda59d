"""Settings outside the job that decide the last bits of a result: threads, kernels and the options of libraries."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import torch

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.nn.ghost.ghost_choice import kernels_for_gpu
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.train.run.versions import installed_versions

_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "OMP_THREAD_LIMIT",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Environment variables to compare. OMP_NUM_THREADS and MKL_NUM_THREADS show in torch's number of threads."""


def arithmetic(*, on_gpu: bool) -> dict[str, Any]:
    """Return the arithmetic settings of this process: plain values by name.

    Args:
        on_gpu: this rank trains on torch's current GPU.
    """
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "CPU kernels": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "float32 precision": getattr(torch.backends, "fp32_precision", None),  # since torch 2.9
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        **{name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
    }
    if on_gpu:
        cudnn, dali = torch.backends.cudnn, "nvidia-dali-cuda"
        tf32 = cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else cudnn.allow_tf32  # since torch 2.9
        found |= {"GPU": torch.cuda.get_device_name(), "cuDNN": cudnn.version(), "cuDNN float32 precision": tf32}
        found |= {"cuDNN deterministic": cudnn.deterministic, "cuDNN benchmark": cudnn.benchmark}
        found["ghost norms"] = kernels_for_gpu(torch.device("cuda", torch.cuda.current_device()))
        found |= {name: version for name, version in installed_versions().items() if name.startswith(dali)}
    return found


def check_same_arithmetic(ranks: Ranks, *, on_gpu: bool) -> None:
    """Check that all ranks have the same arithmetic settings, which exact mode requires. All ranks call it together.

    Args:
        ranks: all ranks.
        on_gpu: they train on GPUs.

    Raises:
        CollectiveError: a rank's settings differ from those of rank 0; the message names the rank and the settings.
    """
    mine = arithmetic(on_gpu=on_gpu)
    theirs = json.loads(ranks.broadcast_from_rank0(lambda: dump_json(mine).encode(), "arithmetic"))

    def check() -> None:
        differences = [
            f"{name} is {mine.get(name)!r}, on rank 0 it is {theirs.get(name)!r}"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]
        if differences:
            place = f"rank {ranks.rank} on {socket.gethostname()}"
            fault = f"needs the same arithmetic on all ranks, but on {place} {'; '.join(differences)}"
            raise JobError([Fault("layout.exact", f"{fault}; make them equal, or use layout.exact = false")])

    ranks.run_on_all(check)
