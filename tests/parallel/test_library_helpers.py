"""The helpers for a custom training loop on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.library import (
    PlanBatchSampler,
    PlanLR,
    Stream,
    evaluate,
    load_checkpoint,
    plan_updates,
    save_checkpoint,
    split_batches,
)
from hvd_batchgrow.library.device import choose_device


def measure(network: nn.Module, ids: list[int]) -> dict[str, tuple[Tensor, int]]:
    values = network(torch.tensor(ids, dtype=torch.float64))
    return {"mean": (values.sum(), len(ids)), "large": ((values > 8).sum(), len(ids))}


@pytest.mark.parametrize("batch_size", [2, 7, 10])  # 10: a single batch, on rank 0
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


def test_horovod_accumulates_the_micro_batches_of_a_growing_update(ranks: Ranks) -> None:
    if not ranks.backend.startswith("horovod"):
        pytest.skip("needs Horovod")
    import horovod.torch as hvd

    growth = {"policy": "grow", "epochs": 3, "global_batch": 16, "boundaries_epochs": [1, 2], "noise_factor": 2}
    growth["max_batch"] = 64
    plan = plan_updates(
        growth, lr=0.1, momentum=0.9, num_samples=96, ghost_batch=4, num_ranks=ranks.size, max_micro_batch=8
    )
    torch.manual_seed(0)
    inputs, targets = torch.randn(96, 5), torch.randn(96, 1)
    network, alone = nn.Linear(5, 1), nn.Linear(5, 1)
    alone.load_state_dict(network.state_dict())

    sampler = PlanBatchSampler(plan, 1, ranks.rank, ranks.size, span="run")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=network.named_parameters())
    scheduler = PlanLR(optimizer, plan, sampler)
    for update, batches in sampler.by_update(sampler):
        optimizer.set_backward_passes_per_step(sampler.accumulation)
        optimizer.zero_grad()
        for ids in batches:
            loss = nn.functional.mse_loss(network(inputs[ids]), targets[ids])
            (loss / len(update.micro_batches)).backward()
        optimizer.step()
        scheduler.step()

    reference, stream, samples = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9), Stream(96, 1), 0
    for batch in [16] * 6 + [32] * 3 + [64] * 2:
        ids = stream.ids(samples, samples + batch).tolist()
        reference.zero_grad()
        nn.functional.mse_loss(alone(inputs[ids]), targets[ids]).backward()
        reference.step()
        samples += batch
    assert samples == scheduler.samples
    assert torch.allclose(network.weight, alone.weight, rtol=1e-4, atol=1e-6)


def test_all_ranks_choose_the_cpu_where_no_gpu_is_visible(ranks: Ranks) -> None:
    assert choose_device(ranks) == torch.device("cpu")
