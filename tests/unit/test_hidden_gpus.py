"""Tests compute on the CPU, on a machine with GPUs too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvd_batchgrow.comm.devices import visible_gpus
from tests.devices import GPU_TESTS, only_gpu_tests

ROOT = GPU_TESTS.parents[1]


def test_this_process_and_its_children_see_no_gpu() -> None:
    assert visible_gpus().uuids == ()
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "''\n"
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("words", "folder", "expected"),
    [
        (["tests/gpu"], ".", True),
        (["tests/gpu/test_training.py::test_a", "tests/gpu/test_ghost_norm.py"], ".", True),
        ([str(GPU_TESTS)], "/", True),
        (["gpu"], "tests", True),
        (["."], "tests/gpu", True),
        (["tests"], ".", False),
        (["tests/gpu", "tests/unit"], ".", False),
        (["tests/gpu/../unit"], ".", False),
        (["tests/gpu_other"], ".", False),
        ([], ".", False),
    ],
)
def test_only_a_run_of_the_gpu_tests_alone_sees_gpus(words: list[str], folder: str, expected: bool) -> None:
    assert only_gpu_tests(words, ROOT / Path(folder)) == expected
