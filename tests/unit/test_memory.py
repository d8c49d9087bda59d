"""Freed memory stays with the process: seen by the pages that the kernel has to give it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from hvd_batchgrow.train.malloc_tuning import keep_freed_memory

PROGRAM = """
import resource, sys
import torch
from hvd_batchgrow.train.malloc_tuning import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory({})
for _ in range(20):  # until the remainders that alignment leaves have found their places
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(kind: str) -> int:
    return int(subprocess.run([sys.executable, "-c", PROGRAM, kind], check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_block_that_was_freed_costs_no_page_fault_when_it_is_used_again() -> None:
    assert page_faults("keep") < 20
    assert page_faults("leave") > 100  # four times 64 MiB, by pages of 4 KiB, or of 2 MiB at most


def test_settings_of_the_user_s_own_stand() -> None:
    assert not keep_freed_memory({"MALLOC_ARENA_MAX": "2"})
    assert not keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"})
