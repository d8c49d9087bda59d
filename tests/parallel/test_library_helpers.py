"""The helpers for a custom training loop on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.library import evaluate, load_checkpoint, save_checkpoint, split_batches
from hvd_batchgrow.library.device import choose_device


def measure(network: nn.Module, ids: list[int]) -> dict[str, tuple[Tensor, int]]:
    values = network(torch.tensor(ids, dtype=torch.float64))
    return {"mean": (values.sum(), len(ids)), "large": ((values > 8).sum(), len(ids))}


@pytest.mark.parametrize("batch_size", [2, 7, 10])  # 10: a single batch, so the other ranks have none
def test_an_evaluation_counts_each_sample_once_on_any_ranks(ranks: Ranks, batch_size: int) -> None:
    batches = split_batches(10, batch_size, ranks.rank, ranks.size)
    assert evaluate(nn.Identity(), batches, measure, ranks) == {"mean": 4.5, "large": 0.1}


def test_ranks_that_measure_different_quantities_fail_together(ranks: Ranks) -> None:
    if ranks.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(ValueError, match="ranks measured different quantities"):
        evaluate(nn.Identity(), [0], lambda network, batch: {f"loss {ranks.rank}": (0.0, 1)}, ranks)


def test_rank_0_writes_a_checkpoint_and_all_ranks_read_it(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / f"checkpoint-{ranks.rank}.pt"  # ranks other than 0 do not see rank 0's file
    assert load_checkpoint(path, ranks) is None
    save_checkpoint(path, {"samples": 48, "w": torch.full((3,), float(ranks.rank))}, ranks)
    assert path.exists() == (ranks.rank == 0)
    state = load_checkpoint(path, ranks)
    assert state
    assert state["samples"] == 48
    assert torch.equal(state["w"], torch.zeros(3))


def test_a_checkpoint_that_cannot_be_written_or_read_is_an_error_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "checkpoint.pt"
    with pytest.raises(CollectiveError, match=r"cannot be written" if ranks.rank == 0 else "^$"):
        save_checkpoint(path, {"samples": 0}, ranks)
    damaged = tmp_path / "checkpoint.pt"
    damaged.write_bytes(b"nothing")
    with pytest.raises(CollectiveError, match=r"cut short" if ranks.rank == 0 else "^$"):
        load_checkpoint(damaged, ranks)


def test_ranks_with_different_sample_counters_save_nothing(ranks: Ranks, tmp_path: Path) -> None:
    if ranks.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(ValueError, match=r'different sample counters, state\["samples"\] = \[0, 1'):
        save_checkpoint(tmp_path / "checkpoint.pt", {"samples": ranks.rank}, ranks)
    assert not [*tmp_path.iterdir()]


def test_all_ranks_choose_the_cpu_where_no_gpu_is_visible(ranks: Ranks) -> None:
    assert choose_device(ranks) == torch.device("cpu")
