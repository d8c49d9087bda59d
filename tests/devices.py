"""Which devices tests see: the CPU, also on a machine with GPUs. Only a run of tests/gpu alone sees its GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

GPU_TESTS = Path(__file__).parent / "gpu"


def only_gpu_tests(words: Sequence[str], folder: Path) -> bool:
    """Return whether pytest runs nothing but tests/gpu.

    Args:
        words: paths on pytest's command line; a test's name may follow after ::.
        folder: in which pytest was started.
    """
    paths = [(folder / word.partition("::")[0]).resolve() for word in words]
    return bool(paths) and all(path.is_relative_to(GPU_TESTS) for path in paths)


def hide_gpus() -> None:
    """Hide the GPUs from this process and from all that it starts: jobs then train on the CPU.

    The expected values of tests are those of a CPU, and several ranks would share a GPU.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def are_hidden() -> bool:
    """Return whether `hide_gpus` has been called here or in a parent process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == ""
