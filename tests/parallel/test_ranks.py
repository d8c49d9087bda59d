from __future__ import annotations

import pytest
import torch

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.train.update.gradients import GradientBuckets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_sum_is_over_all_ranks_and_in_place(ranks: Ranks, dtype: torch.dtype) -> None:
    tensor = torch.arange(5, dtype=dtype) + ranks.rank
    summed = ranks.sum(tensor, f"test.{dtype}")
    assert summed is tensor
    # Σ_r (i + r) = R i + R (R - 1) / 2
    assert summed.tolist() == [ranks.size * i + ranks.size * (ranks.size - 1) // 2 for i in range(5)]


def test_sums_started_in_another_order_on_each_rank_meet_by_name(ranks: Ranks) -> None:
    tensors = {name: torch.full((3,), float(value)) for name, value in (("a", 1), ("b", 10), ("c", 100))}
    order = list(tensors) if ranks.rank % 2 else list(tensors)[::-1]
    handles = [ranks.start_sum(tensors[name], f"order.{name}") for name in order]
    for handle in handles:
        ranks.wait(handle)
    assert [tensors[name][0].item() for name in "abc"] == [ranks.size, 10 * ranks.size, 100 * ranks.size]


def test_gradients_that_are_ready_in_another_order_on_each_rank_meet(ranks: Ranks) -> None:
    parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    buckets = GradientBuckets(parameters, ranks, bucket_bytes=16)
    ready: list[int] = []
    for k, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, k=k: ready.append(k))
    order = [0, 1, 2] if ranks.rank % 2 else [2, 1, 0]
    loss = torch.zeros(())
    for k in order:  # what was computed last is differentiated first
        loss = loss + (10.0**k * parameters[k]).sum()
    for _ in range(2):
        ready.clear()
        buckets.zero()
        buckets.start_when_ready(1.0)
        buckets.begin_backward(loss, 1)
        loss.backward(retain_graph=True)
        buckets.end_backward()
        buckets.start_rest()
        buckets.wait()
    assert ready == order[::-1]
    assert [p.grad[0].item() for p in parameters if p.grad is not None] == [ranks.size * 10.0**k for k in range(3)]


@pytest.mark.parametrize("data", [None, b"", b"x", b"eight by", bytes(range(256)) * 5 + b"odd"])
def test_bytes_of_rank_0_reach_every_rank(ranks: Ranks, data: bytes | None) -> None:
    assert ranks.broadcast_bytes(data if ranks.rank == 0 else b"other", "test.bytes") == data


@pytest.mark.parametrize(
    ("error", "code"),
    [(RunError("disk full"), ExitCode.FAILURE), (JobError([Fault("a.b", "wrong")]), ExitCode.BAD_JOB)],
)
def test_a_failure_of_one_rank_is_known_to_all_and_reported_by_one(
    ranks: Ranks, error: Exception, code: ExitCode
) -> None:
    culprit = ranks.size - 1

    def attempt() -> int:
        if ranks.rank == culprit:
            raise error
        return 1

    with pytest.raises(CollectiveError) as caught:
        ranks.run_on_all(attempt)
    assert caught.value.code == code
    assert caught.value.error is (error if ranks.rank == culprit else None)


def test_what_succeeds_on_all_ranks_gives_each_its_own_result(ranks: Ranks) -> None:
    assert ranks.run_on_all(lambda: ranks.rank) == ranks.rank
    assert ranks.broadcast_from_rank0(lambda: b"from rank %d" % ranks.rank, "test.from0") == b"from rank 0"
