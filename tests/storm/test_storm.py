"""Nothing is lost: runs that are killed at random end as if they had not been. `make storm` is the long form."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storm.attempts import PATIENCE_S
from tests.storm.nursery import Nursery
from tests.storm.storm import Storm, write_job

MEMORY = "/dev/shm"  # noqa: S108
BUDGET_S = 11.0
"""Of each form; a busy machine takes as long as it needs for the least number of kills."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is such a folder: a kill loses nothing of either, and fsync waits for no disk."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def test_a_measured_run_killed_at_random_decides_as_if_it_had_not_been(nursery: Nursery, folder: Path) -> None:
    write_job(folder, measured=True)
    storm = Storm(folder, nursery, seed=0, forms=("1 rank", "2 ranks"))
    decisions = (folder / "runs" / "calm" / "decisions.jsonl").read_text().splitlines()
    assert len(decisions) == 2
    storm.until(kills=5, deadline=time.monotonic() + BUDGET_S)
    tally = storm.until(kills=1, deadline=time.monotonic() + PATIENCE_S)
    print(f"undisturbed {storm.calm_s:.1f} s;", tally)
    assert tally.runs >= 1
    assert tally.blows.total() >= 1, "the storm has hardly blown"


@pytest.mark.parametrize("forms", [("1 rank",), ("2 ranks",), ("1 rank", "2 ranks")], ids=", ".join)
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(
    nursery: Nursery, folder: Path, forms: tuple[str, ...]
) -> None:
    write_job(folder)
    storm = Storm(folder, nursery, seed=0, forms=forms)
    storm.until(kills=12, deadline=time.monotonic() + BUDGET_S)
    tally = storm.until(kills=3, deadline=time.monotonic() + PATIENCE_S)
    print(f"undisturbed {storm.calm_s:.1f} s;", tally)
    assert tally.runs >= 1
    assert tally.kills >= 3, "the storm has hardly blown"
