from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.train.update.gradients import GradientBuckets

pytestmark = [pytest.mark.comm, pytest.mark.launcher]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_sum_is_over_all_ranks_and_in_place(ranks: Ranks, dtype: torch.dtype) -> None:
    tensor = torch.arange(5, dtype=dtype) + ranks.rank
    summed = ranks.all_reduce(tensor, f"test.{dtype}")
    assert summed is tensor
    # Σ_r (i + r) = R i + R (R - 1) / 2
    assert summed.tolist() == [ranks.size * i + ranks.size * (ranks.size - 1) // 2 for i in range(5)]


def test_the_library_that_sums_on_the_cpu_is_named(ranks: Ranks) -> None:
    libraries = {"horovod-mpi": "MPI", "horovod-gloo": "Gloo", "torch-gloo": "Gloo", "single": ""}
    assert ranks.collectives == libraries[ranks.backend]


class Terms:
    """Three parameters in buckets of one each; the backward finishes them in the order `ready`."""

    def __init__(self, ranks: Ranks, ready: list[int]) -> None:
        self.parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
        self.buckets = GradientBuckets(self.parameters, ranks, bucket_bytes=16)
        self.ready = ready
        self.finished: list[int] = []
        for k, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, k=k: self.finished.append(k))

    def update(self) -> list[float]:
        """Sum the gradients, which are 1, 10 and 100 on each rank, and return them."""
        self.finished.clear()
        loss = torch.zeros(())
        for k in self.ready[::-1]:  # what was computed last is differentiated first
            loss = loss + (10.0**k * self.parameters[k]).sum()
        self.buckets.zero(1)
        self.buckets.start_when_ready(1.0)
        self.buckets.begin_backward(loss, 1, 1)
        loss.backward()
        self.buckets.end_backward()
        self.buckets.start_rest()
        self.buckets.wait()
        self.buckets.average()
        assert self.finished == self.ready
        return [p.grad[0].item() for p in self.parameters if p.grad is not None]


def test_all_ranks_start_gradients_in_rank_0s_order_whichever_are_ready_first(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start_all_reduce = ranks.start_all_reduce

    def record(tensor: Tensor, name: str) -> Any:
        started.append(name)
        return start_all_reduce(tensor, name)

    monkeypatch.setattr(ranks, "start_all_reduce", record)
    terms = Terms(ranks, [2, 0, 1] if ranks.rank % 2 else [0, 1, 2])
    assert [terms.update() for _ in range(3)] == [[ranks.size, 10 * ranks.size, 100 * ranks.size]] * 3
    # The last parameter is in bucket 0.
    orders = ["012", "210", "210"]
    assert started == [name for order in orders for name in [*(f"gradients.{k}" for k in order), "reached"]]


def test_gradients_of_ranks_that_have_just_joined_are_summed_with_those_of_the_others(ranks: Ranks) -> None:
    terms = Terms(ranks, [0, 1, 2])
    terms.update()
    if ranks.rank:
        terms = Terms(ranks, [0, 1, 2])
    terms.buckets.use(ranks)
    assert terms.update() == [ranks.size, 10 * ranks.size, 100 * ranks.size]


def test_bytes_of_every_rank_reach_all(ranks: Ranks) -> None:
    expected = [bytes(range(5 * rank)) for rank in range(ranks.size)]
    assert ranks.all_gather_bytes(expected[ranks.rank], "gathered") == expected


@pytest.mark.parametrize("data", [b"", b"x", b"eight by", bytes(range(256)) * 5 + b"odd"])
def test_bytes_of_rank_0_reach_every_rank(ranks: Ranks, data: bytes) -> None:
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
