"""Tests that need a GPU or Triton.

    pytest tests/gpu                        all tests, on a machine with a GPU; elsewhere those that have a CPU form
    TRITON_INTERPRET=1 pytest tests/gpu/test_ghost_triton.py    the kernels' arithmetic in Triton's interpreter

Triton reads the variable when it is imported, so a fixture cannot set it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

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


@pytest.fixture(params=["cuda", "cpu"], ids=["gpu_form", "cpu_form"])
def each_device(request: pytest.FixtureRequest) -> torch.device:
    """Return the first GPU, and in another run of the test the CPU, where the same code shows that it is right."""
    if request.param == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(why_no_gpu())
    return torch.device("cuda", 0)


@pytest.fixture
def arithmetic_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo afterwards what preparing a rank sets in torch and in the environment."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    for name in ("CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS"):  # a variable that is set is restored
        if name in os.environ:
            monkeypatch.setenv(name, os.environ[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # new versions of torch deprecate allow_tf32, old ones have no other name
        before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic
        deterministic, threads = torch.get_deterministic_debug_mode(), torch.get_num_threads()
        yield
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
    torch.set_deterministic_debug_mode(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture
def float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable TF32, and make sums deterministic, as on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # new versions of torch deprecate this name, old ones have no other
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
