"""The rows of the benchmark on CPUs: what each one compares, how long it may take, and which packages it needs."""

from __future__ import annotations

from benchmarks.rows.row import Row

TOTAL_S = 2400.0
"""Limit of all rows together, with their default budgets."""

_TRAINING = ("crc32c", "numpy", "pillow", "pydantic", "torch")
_RANKS = (*_TRAINING, "horovod")

ROWS: dict[str, Row] = {
    "loop": Row(
        "the quickstart's network on Fashion-MNIST against a loop written by hand",
        150.0,
        _TRAINING,
        "benchmarks.cpu.loops",
    ),
    "loop_wrn": Row(
        "WRN-16-4 on generated images against a loop written by hand", 240.0, _TRAINING, "benchmarks.cpu.loops"
    ),
    "ranks": Row(
        "the same network on two ranks against DistributedDataParallel and Horovod's DistributedOptimizer",
        150.0,
        _RANKS,
        "benchmarks.cpu.loops",
    ),
    "ranks_wrn": Row(
        "WRN-16-4 on two ranks against DistributedDataParallel and Horovod's DistributedOptimizer",
        240.0,
        _RANKS,
        "benchmarks.cpu.loops",
    ),
    "lightning": Row(
        "the same network against Lightning with a GradientAccumulationScheduler",
        240.0,
        _TRAINING,
        "benchmarks.cpu.lightning",
    ),
    "start": Row(
        "seconds to the end of the first update, also after a resume, against a loop written by hand",
        150.0,
        _RANKS,
        "benchmarks.cpu.start",
    ),
    "exact": Row("updates in exact mode against fast mode", 120.0, _RANKS, "benchmarks.cpu.modes"),
    "exact_wrn": Row("the same with WRN-16-4", 240.0, _RANKS, "benchmarks.cpu.modes"),
    "backends": Row("two ranks over torch.distributed against Horovod", 90.0, _RANKS, "benchmarks.cpu.modes"),
    "telemetry": Row(
        "an epoch with all telemetry against one without", 200.0, (*_TRAINING, "tensorboard"), "benchmarks.cpu.modes"
    ),
    "memory": Row("peak memory of a rank against a loop written by hand", 90.0, _TRAINING, "benchmarks.cpu.memory"),
    "arrays": Row(
        "images in memory against a flat gather in torch", 60.0, (*_TRAINING, "nvidia-dali"), "benchmarks.cpu.kernels"
    ),
    "jpeg": Row(
        "a folder of JPEG images against torch's DataLoader, DALI's own reader and SPDL",
        240.0,
        (*_TRAINING, "nvidia-dali"),
        "benchmarks.cpu.kernels",
    ),
    "ghost_norm": Row("ghost batch norm against nn.BatchNorm2d", 60.0, ("numpy", "torch"), "benchmarks.cpu.kernels"),
    "lars": Row("LARS against torch's SGD", 60.0, ("numpy", "torch"), "benchmarks.cpu.kernels"),
    "checkpoint": Row(
        "the wait for a checkpoint of ResNet-50 against an update",
        60.0,
        (*_TRAINING, "torchvision"),
        "benchmarks.cpu.kernels",
    ),
}
