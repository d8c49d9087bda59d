"""`doctor` under a launcher: the ranks compare their versions and all-reduce a number."""

from __future__ import annotations

import pytest

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.doctor import rank_checks
from hvd_batchgrow.doctor.check import fail, ok
from hvd_batchgrow.doctor.rank_checks import check_ranks

pytestmark = [pytest.mark.comm, pytest.mark.launcher]


def test_ranks_of_one_environment_agree_and_sum(ranks: Ranks) -> None:
    versions, sums = check_ranks(ranks, [ok("torch", "here")])
    assert (versions.status, sums.status) == ("ok", "ok")
    assert f"{ranks.size} rank" in versions.found
    assert f"{ranks.size} ranks over {ranks.collectives or 'one rank'}" in sums.found


def test_another_version_and_a_failure_on_the_last_rank_are_reported_on_all(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {"torch": "2.13.0" if ranks.rank < ranks.size - 1 or ranks.size == 1 else "2.12.0"}
    monkeypatch.setattr(rank_checks, "installed_versions", lambda: mine)
    checks = [fail("memory", "none left")] if ranks.rank == 1 else []
    found = check_ranks(ranks, checks)
    if ranks.size == 1:
        assert [check.status for check in found] == ["ok", "ok"]
        return
    failure, versions, _ = found
    assert failure.name.startswith("memory on ")
    assert versions.status == "fail"
    assert "torch: 2.13.0 on" in versions.found
    assert f"2.12.0 on {versions.found.rpartition(' on ')[2]}" in versions.found
    assert f"(rank {ranks.size - 1})" in versions.found
