"""Tests that need a GPU or Triton.

    pytest tests/gpu                        all tests, on a machine with a GPU
    TRITON_INTERPRET=1 pytest tests/gpu     the kernels' arithmetic in Triton's interpreter, on any machine

Triton reads the variable when it is imported, so a fixture cannot set it.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from tests.devices import are_hidden

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_no_gpu() -> str:
    """Return why the tests of GPUs are skipped."""
    return "needs a GPU" + (", and pytest hides them unless it runs only tests/gpu" if are_hidden() else "")


@pytest.fixture
def gpu() -> torch.device:
    """Return the first GPU."""
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip(why_no_gpu())
    return torch.device("cuda", 0)


@pytest.fixture
def device() -> torch.device:
    """Return the device of Triton's kernels: a GPU, or the CPU if they are interpreted."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip(f"{why_no_gpu()}; or TRITON_INTERPRET=1 in the environment")
    return torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)


@pytest.fixture
def float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable TF32, and make sums deterministic, as on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # new versions of torch deprecate this name, old ones have no other
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
