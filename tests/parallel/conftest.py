"""These tests run alone, under mpirun and under horovodrun: the same files, other ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from hvd_batchgrow.comm.ranks import Ranks, connect

_JOINED: list[Ranks] = []


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The ranks that the launcher started; as many as tools/test.sh says it asked for."""
    torch.set_num_threads(1)
    joined = connect()
    _JOINED.append(joined)
    assert joined.size == int(os.environ.get("HVD_BATCHGROW_TEST_RANKS", "1")), "not the ranks that were launched"
    yield joined
    _JOINED.clear()
    joined.close()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A rank that fails would leave the others waiting in their next collective: end them all."""
    if report.failed and _JOINED and _JOINED[0].size > 1:
        print(f"rank {_JOINED[0].rank}: {report.nodeid}\n{report.longreprtext}", file=sys.stderr, flush=True)
        _JOINED[0].abort(1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """One report, rank 0's; what fails on another rank is printed by the hook above."""
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("HOROVOD_RANK") or "0"
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if rank != "0" and reporter:
        config.pluginmanager.unregister(reporter)
