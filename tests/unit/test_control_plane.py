"""What rank 0 of 2, 1,000 and 10,000 ranks sends besides gradients; docs/scaling.md has the table.

The code runs on one rank, which records its collectives. The messages and bytes of each follow from its algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from hvd_batchgrow.comm.broadcast_object import broadcast_object
from hvd_batchgrow.comm.ranks import CollectiveError, HostTopology
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.run.run import RunOptions, run_job
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.weights_agree import check_agreement
from tests.helpers import small_job
from tests.lone_rank import Collective, LoneRank, sent_by_rank0
from tests.training import StopAfter
from tests.unit.test_update_engine import Net

COUNTS = (2, 1000, 10_000)
LINEAR = {"visible GPUs.lengths", "visible GPUs"}
"""Collectives at start whose bytes grow with the number of ranks."""
PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
GROUP = 4


def update(size: int, *, exact: bool = False, noise: bool = False) -> list[Collective]:
    """One update of one ghost batch for each rank, all of them on rank 0; the log without gradients."""
    ranks, model = LoneRank(size), Net()
    engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), ranks, exact=exact)
    if noise:
        engine.measure_noise()
    per_pass = 1 if exact else size // 2
    micro_batches = [
        MicroBatch(
            torch.randn(per_pass * GROUP, 5),
            torch.zeros(per_pass * GROUP, dtype=torch.int64),
            tuple(range(first, first + per_pass)),
        )
        for first in range(0, size, per_pass)
    ]
    phase = Phase(0.0, 0.1, 0.9, GROUP * size, GROUP * size, start_samples=0, num_updates=2)
    engine.update(iter(micro_batches), len(micro_batches), phase, size)
    return [one for one in ranks.log if not one.name.startswith("gradients")]


def checkpoint(size: int) -> list[Collective]:
    """The comparison of the weights before a checkpoint."""
    ranks = LoneRank(size)
    check_agreement(Net(), ranks, 0)
    return ranks.log


class Reached(Exception):  # noqa: N818
    """The first update begins."""


class Starting(LoneRank):
    """Ends a run where its first update communicates."""

    def start_all_reduce(self, tensor: torch.Tensor, name: str) -> None:
        if name.startswith(("totals", "gradients")):
            raise Reached
        super().start_all_reduce(tensor, name)


@cache
def start(size: int) -> tuple[Collective, ...]:
    """A run from its job file to its first update."""
    job = small_job(
        data={
            "source": "synthetic_images",
            "root": None,
            "num_samples": 40_000,
            "shape": (8, 8, 1),
            "crop_padding": 0,
            "hflip": False,
        },
        model={"ghost_batch": 2},
        schedule={"global_batch": 20_000, "max_batch": 20_000},
        layout={"max_micro_batch": 4000},
    )
    ranks = Starting(size)
    with pytest.raises(Reached):
        run_job(
            lambda: job,
            ranks,
            RunOptions(Path("runs"), overwrite=True),
            lambda *_: None,
            lambda _: (),
            StopAfter(1, here=False),
        )
    return tuple(ranks.log)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


EVENTS: dict[str, Callable[[int], Sequence[Collective]]] = {"an update": update, "a checkpoint": checkpoint}


@pytest.mark.parametrize("event", EVENTS)
def test_bytes_of_each_collective_do_not_grow_with_the_ranks(event: str) -> None:
    logs = [EVENTS[event](size) for size in COUNTS]
    assert logs[0] == logs[1] == logs[2]
    assert logs[0]


@pytest.mark.parametrize(("exact", "noise"), [(True, False), (False, True)])
def test_bytes_do_not_grow_with_the_ranks_in_exact_mode_or_with_measured_noise(*, exact: bool, noise: bool) -> None:
    assert update(2, exact=exact, noise=noise) == update(64, exact=exact, noise=noise)


@pytest.mark.slow
def test_at_start_only_the_list_of_gpus_grows_with_the_ranks() -> None:
    logs = [start(size) for size in COUNTS]
    assert len({tuple((one.kind, one.name) for one in log) for log in logs}) == 1
    growing = {one.name for one, same in zip(logs[0], logs[2], strict=True) if one.num_bytes != same.num_bytes}
    assert growing == LINEAR
    for log, size in zip(logs, COUNTS, strict=True):
        assert all(one.num_bytes <= 48 * size for one in log if one.name in LINEAR)


@pytest.mark.parametrize("event", EVENTS)
def test_nothing_that_rank_0_sends_grows_faster_than_log2_of_the_ranks(event: str) -> None:
    sent = {size: sent_by_rank0(EVENTS[event](size), size) for size in COUNTS}
    for size in COUNTS[1:]:
        steps = (size - 1).bit_length()  # that of 2 ranks is 1
        assert sent[size].messages == steps * sent[2].messages
        assert sent[size].num_bytes <= steps * sent[2].num_bytes


def test_an_agreement_is_8_bytes_and_after_a_failure_all_ranks_learn_which_rank_failed() -> None:
    ranks = LoneRank(10_000)
    assert ranks.run_on_all(lambda: "result") == "result"
    assert [one.num_bytes for one in ranks.log] == [8]

    def fail() -> None:
        raise RunError("no disk")

    with pytest.raises(CollectiveError, match="no disk"):
        ranks.run_on_all(fail)
    assert [one.num_bytes for one in ranks.log[1:]] == [8, 80_000]


def test_an_object_is_broadcast_in_pieces_of_at_most_256_mib() -> None:
    """MPI counts at most 2³¹ - 1 numbers: 1.4 billion parameters with Adam in one piece would be more."""
    ranks = LoneRank(10_000)
    weights = {"large": torch.zeros(70_000_000), "small": torch.zeros(1000), "other": torch.zeros(3, dtype=torch.int16)}
    broadcast_object(ranks, weights, "checkpoint")
    length, skeleton, *pieces = ranks.log
    assert (length.num_bytes, skeleton.name) == (8, "checkpoint.skeleton")
    assert [one.num_bytes for one in pieces] == [2**28, 280_000_000 - 2**28, 4008]
    assert sent_by_rank0(pieces, 10_000).num_bytes == 14 * 280_004_008


def test_the_topology_of_10_000_ranks_is_found_quickly() -> None:
    """1,250 hosts of eight ranks, one after the other, and in turns."""
    blocks, turns = [rank // 8 for rank in range(10_000)], [rank % 1250 for rank in range(10_000)]
    assert HostTopology.among(blocks, 9999) == HostTopology(7, 8, 1249, 1250)
    assert HostTopology.among(turns, 9999) == HostTopology(7, 8, 1249, 1250)
    assert HostTopology.among([5, 5, 3, 3, 3], 4) == HostTopology(2, 3, 0, 1)


# --- the page --------------------------------------------------------------------------------


def table_row(what: str, log_of: Callable[[int], Sequence[Collective]]) -> str:
    """A row of the table of docs/scaling.md."""
    sent = [sent_by_rank0(log_of(size), size) for size in COUNTS]
    return f"| {what} | {' | '.join(f'{one.num_bytes:,} B in {one.messages:,}' for one in sent)} |"


@pytest.mark.parametrize("event", EVENTS)
def test_the_table_of_the_page_is_what_is_counted(event: str) -> None:
    assert table_row(event, EVENTS[event]) in PAGE


@pytest.mark.slow
def test_the_start_in_the_table_is_what_is_counted() -> None:
    assert table_row("a start without GPUs", start) in PAGE
