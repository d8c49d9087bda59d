"""The first ranks as a separate subset while the others are idle, over every backend."""

from __future__ import annotations

import resource
import time

import pytest
import torch

from hvd_batchgrow.comm.ranks import CollectiveError, HostTopology, Ranks
from hvd_batchgrow.messages.errors import ExitCode, RunError

pytestmark = [pytest.mark.comm, pytest.mark.launcher]


def some(ranks: Ranks) -> int:
    """Return all ranks but one, at least 1."""
    return max(1, ranks.size - 1)


def never() -> bool:
    return False


def sum_of_ones(ranks: Ranks) -> float:
    return ranks.all_reduce(torch.ones(3), "test.ones")[0].item()


def test_collectives_work_in_a_subset_and_in_all_ranks_after_it(ranks: Ranks) -> None:
    for _ in range(2):  # a second time, too
        part = ranks.subset(some(ranks))
        if part is None:
            ranks.wait_until_woken(never)
        else:
            assert (part.rank, part.size) == (ranks.rank, some(ranks))
            assert (part.local_rank, part.local_size) == (part.rank, part.size)  # tests have one host
            assert sum_of_ones(part) == part.size
            assert part.any(flag=part.rank == 0)
            assert part.broadcast_bytes(b"%d" % part.rank, "test.bytes") == b"0"
            with pytest.raises(CollectiveError) as caught:
                part.run_on_all(fail)
            assert caught.value.code == ExitCode.FAILURE
            part.close()
        assert sum_of_ones(ranks) == ranks.size
        assert ranks.broadcast_bytes(b"%d" % ranks.rank, "test.bytes") == b"0"


def fail() -> None:
    raise RunError("planted")


def test_a_subset_of_all_ranks_works_like_all_ranks(ranks: Ranks) -> None:
    part = ranks.subset(ranks.size)
    assert part is not None
    assert (part.rank, part.size, part.local_size) == (ranks.rank, ranks.size, ranks.local_size)
    assert sum_of_ones(part) == ranks.size
    assert not part.stop_requested_elsewhere()
    part.close()
    assert sum_of_ones(ranks) == ranks.size


def test_idle_ranks_use_no_core_and_rejoin(ranks: Ranks) -> None:
    part = ranks.subset(some(ranks))
    if part is None:
        times: list[tuple[float, float]] = []

        def record_times() -> bool:
            used = resource.getrusage(resource.RUSAGE_SELF)
            times.append((time.monotonic(), used.ru_utime + used.ru_stime))
            return times[-1][0] - times[0][0] > 1.5  # ends the test: the others train until then

        ranks.wait_until_woken(record_times)
        # Only the wait is measured: while ranks rejoin on a busy machine, MPI spins until the last one arrives.
        waited_s, used_s = (last - first for first, last in zip(times[0], times[-1], strict=True))
        assert waited_s > 1.5
        assert used_s < 0.02 * waited_s + 0.05
    else:
        while part.size < ranks.size and not part.any(flag=part.stop_requested_elsewhere()):
            pass
        part.close()
    assert sum_of_ones(ranks) == ranks.size


def test_a_stop_request_on_an_idle_rank_reaches_rank_0(ranks: Ranks) -> None:
    part = ranks.subset(some(ranks))
    if part is None:
        ranks.wait_until_woken(lambda: ranks.rank == ranks.size - 1)
    else:
        deadline = time.monotonic() + (120 if ranks.size > 1 else 0)
        # Like the vote in an update: rank 0's flag reaches all ranks of the subset.
        requested = False
        while not requested and not part.any(flag=time.monotonic() > deadline):
            time.sleep(0.01)
            requested = part.any(flag=part.stop_requested_elsewhere())
        assert requested == (ranks.size > 1)
        part.close()
    assert sum_of_ones(ranks) == ranks.size


def test_invalid_subset_sizes_and_waits_are_refused(ranks: Ranks) -> None:
    for count in (0, ranks.size + 1):
        with pytest.raises(ValueError, match=f"has 1 to {ranks.size}, got {count}"):
            ranks.subset(count)
    with pytest.raises(ValueError, match="nothing to wait for"):
        ranks.wait_until_woken(never)


def test_topology_of_hosts_with_different_numbers_of_ranks() -> None:
    hosts = [7, 7, 9, 7, 9]  # hosts 7 and 9 with three and two ranks
    expected = [(0, 3, 0, 2), (1, 3, 0, 2), (0, 2, 1, 2), (2, 3, 0, 1), (1, 2, 1, 2)]
    assert [HostTopology.among(hosts, rank) for rank in range(5)] == [HostTopology(*numbers) for numbers in expected]
