"""Ghost norm, nn.BatchNorm2d, and a copy of the bytes that both must at least read and write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.ghost_batch_norm import RESNET_MAPS, VALUES_A_TURN, contestant
from benchmarks.rows.figures import Figure, Group, Outcome, compare, ratios_of
from benchmarks.rows.row import Settings, say
from benchmarks.turns import synchronize, take_turns
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
from hvd_batchgrow.nn.ghost.ghost_choice import choose

COPY, TORCH, OURS = "copy", "nn.BatchNorm2d", "ghost norm"
PASSES = 5
"""Tensors that a forward (reads x, writes y) and a backward (reads x and dy, writes dx) move at least."""


def run(name: str, settings: Settings) -> Outcome:
    """Measure each map of ResNet-50."""
    device = torch.device(settings.device)
    maps, samples, ghost_batch = (((8, 16),), 16, 4) if settings.is_tiny else (RESNET_MAPS, 256, 32)
    dtype = torch.float32 if settings.is_tiny else torch.bfloat16
    groups, used = [], ""
    for k, (channels, side) in enumerate(maps):
        shape = (samples, channels, side, side)
        title = f"{' × '.join(map(str, shape))}, {str(dtype).partition('.')[2]}, channels_last"
        say(title)
        x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        groups.append(measure(title, x, ghost_batch, settings.turns, settings.part(k, len(maps))))
        used = choose(x, samples // ghost_batch).__module__.rpartition(".")[2]
    return Outcome(groups, [f"ghost batches of {ghost_batch}, computed by {used}"])


def measure(title: str, x: Tensor, ghost_batch: int, turns: int, is_over: Callable[[], bool]) -> Group:
    """Time the contestants on one input, in GB/s of the bytes that must be moved."""
    norms: dict[str, nn.Module] = {}
    for relu, suffix in ((False, ""), (True, " + ReLU")):
        after = [nn.ReLU(inplace=True)] if relu else []
        norms[TORCH + suffix] = nn.Sequential(nn.BatchNorm2d(x.shape[1]), *after)
        ours = GhostBatchNorm2d(x.shape[1], ghost_batch, relu=relu)
        ours.deferred = True
        norms[OURS + suffix] = ours
    contestants = {norm: contestant(module.to(x.device), x) for norm, module in norms.items()}
    rates = take_turns({COPY: copies(x), **contestants}, turns, is_over)
    bytes_per_sample = PASSES * x[0].numel() * x.element_size()
    group = compare(title, "GB/s", rates, COPY, bytes_per_sample / 1e9)
    speedups = [
        Figure(f"ratio to BatchNorm2d{suffix}", ratios_of(rates[OURS + suffix], rates[TORCH + suffix]))
        for suffix in ("", " + ReLU")
    ]
    return Group(group.title, group.unit, [*group.figures, *speedups], COPY)


def copies(x: Tensor) -> Callable[[], int]:
    """Return a contestant that copies as many bytes as the others must move in the same number of samples."""
    target = torch.empty_like(x)
    # A copy moves two tensors: one is read and one written. Five copies move as much as two forwards and backwards.
    pairs = max(1, VALUES_A_TURN[x.device.type] // x.numel() // 2)

    def work() -> int:
        for _ in range(PASSES * pairs):
            target.copy_(x)
        synchronize(x.device)
        return 2 * pairs * len(x)

    return work
