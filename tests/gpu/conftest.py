"""Tests that need a GPU, or that Triton be installed.

    pytest tests/gpu                        on a machine with a GPU: all
    TRITON_INTERPRET=1 pytest tests/gpu     anywhere: the kernels' arithmetic, in Triton's interpreter

Triton looks at the variable when it is imported: hence no fixture sets it.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU."""
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda", 0)


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels can run: on a GPU, or, interpreted, on the CPU."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in the environment")
    return torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)


@pytest.fixture
def float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 are of 24 bits, and sums always in one order, as on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have the setting's new name, which its older ones lack
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
