"""Run all layouts that `verify` compares on one kind of device, even if they have more ranks than the host has GPUs."""

from __future__ import annotations

from typing import Any

from hvd_batchgrow.comm.launcher_env import Backend
from hvd_batchgrow.config.layout import LayoutSection
from hvd_batchgrow.messages.wording import counted


def same_device(layout: LayoutSection, max_ranks: int, num_gpus: int, backend: Backend) -> tuple[dict[str, Any], str]:
    """Return the keys of `[layout]` with which every layout uses GPUs, or every layout the CPU.

    GPUs and CPUs round differently, so that a comparison between them says nothing about the layouts.

    Args:
        layout: of the job.
        max_ranks: most ranks of a layout.
        num_gpus: GPUs that this process sees, as will the ranks of each layout.
        backend: communication backend of the ranks.

    Returns:
        Keys to change, and a notice for the user if ranks share GPUs, or if GPUs are not used; otherwise empty.
    """
    if not num_gpus or layout.device == "cpu":
        return {}, ""
    share = -(-max_ranks // num_gpus)
    if share == 1:
        return {"device": "cuda"}, ""
    shared = f"{max_ranks} ranks share {counted(num_gpus, 'GPU')}"
    if backend == "horovod" and layout.device == "auto":
        return {"device": "cpu"}, f"all layouts use the CPU: {shared}, for which Horovod has no collectives"
    per_gpu = max(share, layout.ranks_per_gpu or 1)
    notice = f"{shared}: layout.ranks_per_gpu = {per_gpu}, so that Gloo sums gradients instead of NCCL"
    return {"device": "cuda", "ranks_per_gpu": per_gpu}, notice
