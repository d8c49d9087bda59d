"""The first ranks as ranks of their own, while the others wait: whatever carries their sums."""

from __future__ import annotations

import resource
import time

import pytest
import torch

from hvd_batchgrow.comm.ranks import CollectiveError, HostTopology, Ranks
from hvd_batchgrow.messages.errors import ExitCode, RunError


def some(ranks: Ranks) -> int:
    """All but one, where there are more."""
    return max(1, ranks.size - 1)


def never() -> bool:
    return False


def sum_of_ones(ranks: Ranks) -> float:
    return ranks.sum(torch.ones(3), "test.ones")[0].item()


def test_all_operations_work_in_a_part_and_in_the_whole_after_it(ranks: Ranks) -> None:
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


def test_a_part_of_all_ranks_is_the_whole(ranks: Ranks) -> None:
    part = ranks.subset(ranks.size)
    assert part is not None
    assert (part.rank, part.size, part.local_size) == (ranks.rank, ranks.size, ranks.local_size)
    assert sum_of_ones(part) == ranks.size
    assert not part.stop_requested_elsewhere()
    part.close()
    assert sum_of_ones(ranks) == ranks.size


def test_ranks_that_wait_burn_no_core_and_join_at_once(ranks: Ranks) -> None:
    part = ranks.subset(some(ranks))
    begin = time.monotonic()
    if part is None:
        looks: list[tuple[float, float]] = []

        def look() -> bool:
            used = resource.getrusage(resource.RUSAGE_SELF)
            looks.append((time.monotonic(), used.ru_utime + used.ru_stime))
            return False

        ranks.wait_until_woken(look)
        # Of the wait alone: on a busy machine those that join wait for each other, in MPI, whose wait is a busy one.
        waited_s, used_s = (last - first for first, last in zip(looks[0], looks[-1], strict=True))
        assert waited_s > 1  # 1.5 s, less what this rank was late to begin with
        assert used_s < 0.02 * waited_s + 0.05
    else:
        while not part.any(flag=time.monotonic() - begin > 1.5):
            pass
        part.close()
    begin = time.monotonic()
    sum_of_ones(ranks)
    assert time.monotonic() - begin < 5  # under 1 s, but on a machine that may be busy


def test_a_request_on_a_rank_that_waits_reaches_rank_0(ranks: Ranks) -> None:
    part = ranks.subset(some(ranks))
    if part is None:
        ranks.wait_until_woken(lambda: ranks.rank == ranks.size - 1)
    else:
        deadline = time.monotonic() + (20 if ranks.size > 1 else 0)
        # As an update's vote: rank 0's flag reaches all of the part.
        asked = False
        while not asked and not part.any(flag=time.monotonic() > deadline):
            time.sleep(0.01)
            asked = part.any(flag=part.stop_requested_elsewhere())
        assert asked == (ranks.size > 1)
        part.close()
    assert sum_of_ones(ranks) == ranks.size


def test_what_cannot_be_a_part_is_refused(ranks: Ranks) -> None:
    for count in (0, ranks.size + 1):
        with pytest.raises(ValueError, match=f"has 1 to {ranks.size}, got {count}"):
            ranks.subset(count)
    with pytest.raises(ValueError, match="nothing to wait for"):
        ranks.wait_until_woken(never)


def test_a_place_is_counted_over_hosts_that_may_hold_unequal_numbers() -> None:
    hosts = [7, 7, 9, 7, 9]  # hosts 7 and 9 with three and two ranks
    expected = [(0, 3, 0, 2), (1, 3, 0, 2), (0, 2, 1, 2), (2, 3, 0, 1), (1, 2, 1, 2)]
    assert [HostTopology.among(hosts, rank) for rank in range(5)] == [HostTopology(*numbers) for numbers in expected]
