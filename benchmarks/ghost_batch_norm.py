"""Ghost batch norm, forward and backward, on one thread; samples a second.

python -m benchmarks.ghost_batch_norm [--turns 15] [--samples 256] [--channels 64] [--ghost-batch 32] [--fresh-memory]

Beside ours: nn.BatchNorm2d, which takes the whole micro-batch as one; and a loop of it over ghost batches, whose
outputs are concatenated. By default the process keeps the memory that it frees. glibc returns large blocks to the
system and gets them anew, page by page, which takes longer than to normalise what is in them, and meets a contestant
or not by what was allocated before: `--fresh-memory` leaves that on.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.turns import print_rates, take_turns
from hvd_batchgrow.nn.ghost_batch_norm import GhostBatchNorm2d

SIDES, LAYOUTS = (32, 8), (torch.contiguous_format, torch.channels_last)
VALUES_A_TURN = 2**26
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


class ChunkLoop(nn.BatchNorm2d):
    """The plain way to normalise ghost batches."""

    def __init__(self, num_features: int, ghost_batch: int) -> None:
        super().__init__(num_features)
        self.ghost_batch = ghost_batch

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each ghost batch, and join them."""
        return torch.cat([super(ChunkLoop, self).forward(chunk) for chunk in x.split(self.ghost_batch)])


def contestant(norm: nn.Module, x: Tensor) -> Callable[[], int]:
    """Some forwards and backwards of an input."""
    inputs, upstream = x.clone().requires_grad_(), torch.randn_like(x)
    wanted = [inputs, *norm.parameters()]
    repeats = max(1, VALUES_A_TURN // x.numel())

    def run() -> int:
        for _ in range(repeats):
            torch.autograd.grad(norm(inputs), wanted, upstream)
        return repeats * len(x)

    return run


def keep_memory() -> None:
    """Have glibc keep what is freed."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def main() -> None:
    """Time them in turns, shape by shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--ghost-batch", type=int, default=32)
    parser.add_argument("--fresh-memory", action="store_true")
    arguments = parser.parse_args()
    if not arguments.fresh_memory:
        keep_memory()
    torch.set_num_threads(1)
    channels, ghost_batch = arguments.channels, arguments.ghost_batch
    for side in SIDES:
        for layout in LAYOUTS:
            x = torch.randn(arguments.samples, channels, side, side).to(memory_format=layout)
            norms = {
                "nn.BatchNorm2d": nn.BatchNorm2d(channels),
                "loop over ghost batches": ChunkLoop(channels, ghost_batch),
                "hvd_batchgrow": GhostBatchNorm2d(channels, ghost_batch),
            }
            print(f"\n{tuple(x.shape)}, ghost batches of {ghost_batch}, {str(layout).removeprefix('torch.')}")
            contestants = {name: contestant(norm, x) for name, norm in norms.items()}
            print_rates(take_turns(contestants, arguments.turns), "samples/s", "nn.BatchNorm2d")


if __name__ == "__main__":
    main()
