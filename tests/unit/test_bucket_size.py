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
