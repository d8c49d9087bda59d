"""The rows of the GPU check: what each one does, how long it may take, and which packages it needs.

Only Python's standard library is imported here: the check starts on a machine where other packages are missing.
"""

from __future__ import annotations

from benchmarks.rows.row import Row

TOTAL_S = 480.0
"""Limit of all rows together, with their default budgets."""

_TRAINING = ("crc32c", "numpy", "pillow", "pydantic", "torch")
_TESTS = ("hypothesis", "pytest", "pytest-xdist", "rich", "tomli-w", "tyro")

ROWS: dict[str, Row] = {
    "tests": Row("tests/gpu", 110.0, (*_TRAINING, *_TESTS), "benchmarks.gpu.test_suite"),
    "ghost_norm": Row(
        "ghost norm, forward and backward, compared with a copy of the bytes that these must read and write",
        45.0,
        ("numpy", "torch"),
        "benchmarks.gpu.ghost_norm",
    ),
    "optimizers": Row(
        "updates of all weights of ResNet-50", 25.0, ("numpy", "pydantic", "torch"), "benchmarks.gpu.optimizers"
    ),
    "resnet50": Row(
        "ResNet-50, bfloat16, channels_last, one batch again and again",
        60.0,
        (*_TRAINING, "torchvision"),
        "benchmarks.gpu.training",
    ),
    "resnet50_dali": Row(
        "ResNet-50, bfloat16, channels_last, JPEG images read by DALI",
        75.0,
        (*_TRAINING, "torchvision", "nvidia-dali"),
        "benchmarks.gpu.training",
    ),
    "wrn": Row("WRN-16-4, micro-batches of 128 images of 32 × 32", 45.0, _TRAINING, "benchmarks.gpu.training"),
    "twins": Row(
        "WRN-16-4 with a growing batch, and its twin with a decaying learning rate",
        60.0,
        (*_TRAINING, "tomli-w"),
        "benchmarks.gpu.twins",
    ),
    "two_ranks": Row(
        "two ranks on one device, gradients summed over Gloo", 40.0, _TRAINING, "benchmarks.gpu.two_ranks"
    ),
}
