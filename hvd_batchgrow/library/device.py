"""The device of a rank in a custom training loop."""

from __future__ import annotations

import sys

import torch

from hvd_batchgrow.comm.devices import DeviceKey, take_device
from hvd_batchgrow.comm.ranks import Ranks


def choose_device(ranks: Ranks, device: DeviceKey = "auto", ranks_per_gpu: int | None = None) -> torch.device:
    """Return this rank's device, and make it torch's current one. All ranks call it together.

    If all ranks see a GPU, each gets one; if none does, all use the CPU. If some GPUs are not used, rank 0 prints why.

    Args:
        ranks: of `connect`.
        device: "auto"; "cuda" to require GPUs; or "cpu".
        ranks_per_gpu: the most ranks that may share a GPU; None: 1.

    Raises:
        CollectiveError: only some ranks see GPUs; "cuda" is required and not available; or more ranks would share a
            GPU than allowed. The message names `device` and `ranks_per_gpu` as keys of `layout`, as in a job file.
    """
    placement = take_device(ranks, device, ranks_per_gpu, "choose_device")
    if ranks.rank == 0:
        for note in placement.notes:
            print(note, file=sys.stderr)
    return placement.device
