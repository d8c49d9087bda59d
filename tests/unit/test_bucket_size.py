"""How large the buckets of gradients are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.train.update.gradients import GradientBuckets, bucket_size

MIB = 1 << 20


@pytest.mark.parametrize(
    ("num_floats", "expected"),
    [(100, MIB), (2 * MIB, MIB), (4 * MIB, 2 * MIB), (32 * MIB, 16 * MIB), (100 * MIB, 16 * MIB)],
)
def test_a_bucket_is_an_eighth_of_the_gradient_within_limits(num_floats: int, expected: int) -> None:
    parameter = nn.Parameter(torch.empty(num_floats, device="meta"))
    assert bucket_size([parameter]) == expected


def test_a_gradient_of_several_mib_has_buckets_that_can_overlap_the_backward() -> None:
    parameters = [nn.Parameter(torch.zeros(MIB // 8)) for _ in range(24)]  # 0.5 MiB each: 12 MiB, so 1.5 MiB a bucket
    sizes = [len(members) for members in GradientBuckets(parameters, SingleRank()).members]
    assert sizes == [3] * 8


@pytest.mark.parametrize(
    ("dtypes", "value", "limit"),
    [
        ([torch.float16], 3000.0, 1e-6),  # a square is 9e6, and the largest float16 65504
        ([torch.float16], 2.0**-20, 1e-6),  # a square is 0 in float16
        ([torch.bfloat16], 3.0, 1e-6),
        ([torch.float32], 3.0, 1e-6),
        ([torch.float64], 3e20, 1e-14),
        ([torch.float16, torch.float32, torch.bfloat16], 3072.0, 1e-6),
    ],
)
def test_the_norm_of_16_bit_gradients_does_not_overflow(dtypes: list[torch.dtype], value: float, limit: float) -> None:
    """1,000 equal values v in each bucket have the 2-norm v · √(1,000 · buckets)."""
    parameters = [nn.Parameter(torch.zeros(1000, dtype=dtype)) for dtype in dtypes]
    buckets = GradientBuckets(parameters, SingleRank())
    for bucket in buckets._buckets:
        bucket.flat.fill_(value)
    rounded = float(torch.tensor(value, dtype=dtypes[0]))
    norm = buckets.norm()
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(rounded * (1000 * len(dtypes)) ** 0.5, rel=limit)
