from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.update.rounding_noise import Noise, noise_size
from hvd_batchgrow.verification.rounding_limits import RoundingLimits

CPU = torch.device("cpu")


def one(*values: float, dtype: torch.dtype = torch.float64) -> dict[int, dict[str, torch.Tensor]]:
    """One state at sample 8, of one tensor."""
    return {8: {"w": torch.tensor(values, dtype=dtype)}}


def test_the_limit_is_twice_the_largest_change_of_a_repeat_and_one_ulp() -> None:
    limits = RoundingLimits(one(3.0, 4.0), [one(3.0, 4.1), one(3.2, 4.0)])
    worst = limits.worst(one(3.0, 4.35))
    # |a| = 5: the repeats moved it by 0.1 and 0.2
    assert worst.limit == pytest.approx(2 * 0.2 / 5, rel=1e-12)
    assert worst.difference == pytest.approx(0.35 / 5, rel=1e-12)
    assert (worst.samples, worst.tensor, worst.passed) == (8, "w", True)
    assert not limits.worst(one(3.0, 4.45)).passed
    still = RoundingLimits(one(3.0, 4.0, dtype=torch.float32), [one(3.0, 4.0, dtype=torch.float32)])
    assert still.worst(one(3.0, 4.0 + 2**-22, dtype=torch.float32)).passed
    assert not still.worst(one(3.0, 4.0 + 2**-19, dtype=torch.float32)).passed


def test_the_tensor_nearest_to_its_limit_is_the_worst_whatever_its_size() -> None:
    def state(a: float, b: float) -> dict[int, dict[str, torch.Tensor]]:
        return {8: {"a": torch.tensor([a]), "b": torch.tensor([b])}}

    limits = RoundingLimits(state(1000.0, 1.0), [state(1001.0, 1.001)])
    assert limits.worst(state(1001.0, 1.0019)).tensor == "b"
    assert limits.worst(state(1001.9, 1.001)).tensor == "a"


def test_integers_must_be_equal_and_infinities_may_be() -> None:
    counts = RoundingLimits(one(3, dtype=torch.int64), [one(3, dtype=torch.int64)])
    assert counts.worst(one(3, dtype=torch.int64)).passed
    assert not counts.worst(one(4, dtype=torch.int64)).passed
    mask = RoundingLimits(one(-math.inf, math.nan, 0.0), [one(-math.inf, math.nan, 0.0)])
    assert mask.worst(one(-math.inf, math.nan, 0.0)).passed
    for wrong in ((0.0, math.nan, 0.0), (math.inf, math.nan, 0.0), (-math.inf, 1.0, 0.0), (-math.inf, math.nan, 1.0)):
        assert not mask.worst(one(*wrong)).passed


def test_states_that_cannot_be_compared_are_named() -> None:
    limits = RoundingLimits(one(1.0), [one(1.0)])
    with pytest.raises(RunError, match=r"at samples \[16\], plain autograd at \[8\]"):
        limits.worst({16: one(1.0)[8]})
    with pytest.raises(RunError, match="different tensors: v, w"):
        limits.worst({8: {"v": torch.ones(1)}})
    with pytest.raises(RunError, match="different tensors: w"):
        limits.worst(one(1.0, 2.0))


def test_noise_changes_every_value_by_its_size_up_or_down() -> None:
    values = torch.tensor([1.0, -2.0, 0.0, 4.0]).repeat(100)
    changes = (Noise(2.0**-10, 1)(values) - values)[values != 0] / values[values != 0]
    assert set(changes.tolist()) == {2.0**-10, -(2.0**-10)}
    assert torch.equal(Noise(0.0, 1)(values), values)
    assert torch.equal(Noise(0.1, 1)(torch.arange(5)), torch.arange(5))
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    with Noise(0.1, 1).on_weights(model):
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


def test_noise_is_as_coarse_as_the_coarsest_type_that_takes_part() -> None:
    network = nn.Linear(2, 2)
    assert noise_size(UpdateSection(), network, CPU) == 64 * 2.0**-23
    assert noise_size(UpdateSection(precision="bfloat16"), network, CPU) == 2 * 2.0**-7
    assert noise_size(UpdateSection(allreduce_dtype="float16"), network, CPU) == 2 * 2.0**-10
    assert noise_size(UpdateSection(), network.bfloat16(), CPU) == 2 * 2.0**-7
