"""Exact mode needs the same kernels on all ranks."""

from __future__ import annotations

import pytest

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.train.arithmetic_settings import check_same_arithmetic

pytestmark = [pytest.mark.comm, pytest.mark.launcher]


def test_a_rank_with_other_kernels_is_named(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_arithmetic(ranks, on_gpu=False)
    last = ranks.size - 1
    if ranks.rank == last:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    if last == 0:
        check_same_arithmetic(ranks, on_gpu=False)
        return
    with pytest.raises(CollectiveError) as failure:
        check_same_arithmetic(ranks, on_gpu=False)
    assert failure.value.code == 2
    if ranks.rank == last:
        report = f"layout.exact: needs the same arithmetic on all ranks, but on rank {last} on "
        assert report in str(failure.value.error)
        assert "ATEN_CPU_CAPABILITY is 'default', on rank 0 it is None" in str(failure.value.error)
