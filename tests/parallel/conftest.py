"""These tests run alone, under mpirun and under horovodrun: the same files, other ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.launcher_env import RELAY_S, launched_ranks
from hvd_batchgrow.comm.ranks import Ranks

_JOINED: list[Ranks] = []


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The ranks that the launcher started; as many as tools/test.sh says it asked for, and by the backend it names."""
    torch.set_num_threads(1)
    backend: Any = os.environ.get("HVD_BATCHGROW_TEST_COMM", "auto")
    joined = connect(backend)
    _JOINED.append(joined)
    assert joined.size == int(os.environ.get("HVD_BATCHGROW_TEST_RANKS", "1")), "not the ranks that were launched"
    assert joined.backend.startswith({"auto": ""}.get(backend, backend)) or joined.size == 1
    yield joined
    _JOINED.clear()
    joined.close()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A rank that fails would leave the others waiting in their next collective: end them all."""
    if report.failed and _JOINED and _JOINED[0].size > 1:
        print(f"rank {_JOINED[0].rank}: {report.nodeid}\n{report.longreprtext}", file=sys.stderr, flush=True)
        time.sleep(RELAY_S)
        _JOINED[0].abort(1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """One report, rank 0's; what fails on another rank is printed by the hook above."""
    rank, _ = launched_ranks(os.environ)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if rank and reporter:
        config.pluginmanager.unregister(reporter)
