"""The comparison of branches: losses per block, what passes, and the critical batch of a known problem."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.results.branching import (
    BranchRecord,
    block_losses,
    compare_branches,
    held_out_difference,
    read_branch,
)
from hvd_batchgrow.results.outcomes import Outcomes
from tests.helpers import plan_tree

Array = NDArray[np.float64]


def record(factor: int, losses: Array, held_out: float = 1.0, outcomes: Outcomes | None = None) -> BranchRecord:
    return BranchRecord(Path(f"k{factor}"), factor, 32 * factor, 0.1, 1, losses, 0.5, held_out, "test", outcomes)


# --- a noisy quadratic, whose critical batch is known -------------------------------------------

SEEDS, DIM, LR, NOISE, BLOCKS, FACTORS = 50, 80, 0.05, 0.3, 128, (1, 2, 4, 8, 16)


def stationary_loss(factor: int) -> float:
    """Mean of ½|w|² under SGD on ½|w - x|² with k times the batch and the learning rate.

    w' = (1 - kε) w + kε x̄ with x̄ of variance σ²/k per dimension. Its variance v solves
    v = (1 - kε)² v + k ε² σ², so v = ε σ² / (2 - kε).
    """
    return 0.5 * DIM * LR * NOISE**2 / (2 - factor * LR)


def quadratic_losses(seeds: int = SEEDS) -> dict[int, Array]:
    """Losses of each update (seeds, updates) by factor, from the same samples for all factors."""
    random = np.random.default_rng(11)
    updates = BLOCKS * max(FACTORS)
    samples = NOISE * random.standard_normal((updates, seeds, DIM))  # the mean x̄ of each small batch
    start = math.sqrt(LR * NOISE**2 / (2 - LR)) * random.standard_normal((seeds, DIM))
    losses = {}
    for factor in FACTORS:
        means = samples.reshape(updates // factor, factor, seeds, DIM).mean(1)
        weights, found = start.copy(), np.empty((updates // factor, seeds))
        for step, mean in enumerate(means):
            found[step] = 0.5 * (weights**2).sum(1) - (weights * mean).sum(1)  # without ½|x|², equal in all branches
            weights += factor * LR * (mean - weights)
        losses[factor] = found.T
    return losses


@pytest.fixture(scope="module")
def quadratic() -> dict[int, Array]:
    return quadratic_losses()


def test_the_known_critical_batch_of_a_noisy_quadratic_is_found(quadratic: dict[int, Array]) -> None:
    worse = {factor: stationary_loss(factor) - stationary_loss(1) for factor in FACTORS}
    tolerance = worse[4] + 0.75 * (worse[8] - worse[4])
    verdicts = []
    for seed in range(SEEDS):
        records = [record(factor, quadratic[factor][seed]) for factor in FACTORS]
        verdicts.append(compare_branches(records, 32 * 16, tolerance).critical_batch)
    assert np.mean(np.array(verdicts) == 4 * 32) > 0.95
    assert max(verdicts) == 4 * 32


def test_intervals_contain_the_known_differences_of_a_noisy_quadratic(quadratic: dict[int, Array]) -> None:
    covered = []
    for seed in range(SEEDS):
        found = compare_branches([record(factor, quadratic[factor][seed]) for factor in FACTORS], 32 * 16)
        for result in found.results[1:]:
            assert result.difference is not None
            true = stationary_loss(result.record.factor) - stationary_loss(1)
            covered.append(result.difference.low <= true <= result.difference.high)
    # 200 intervals, those of a seed correlated: two standard errors of 50 independent ones are 6.2 %
    assert np.mean(covered) == pytest.approx(0.95, abs=0.062)


def test_pairing_makes_the_intervals_narrower_than_those_of_other_samples(quadratic: dict[int, Array]) -> None:
    widths = []
    for seed in range(0, SEEDS, 5):
        paired, other = (
            compare_branches([record(1, quadratic[1][seed]), record(2, quadratic[2][which])], 32 * 16).results[1]
            for which in (seed, seed + 1)
        )
        assert paired.difference is not None
        assert other.difference is not None
        widths.append(paired.difference.half_width / other.difference.half_width)
    assert np.median(widths) < 0.5


# --- weights of samples -------------------------------------------------------------------------


def test_a_network_is_not_worse_than_itself_whatever_the_weights_of_its_samples() -> None:
    """Class weights of 49:1, with 2 % of the samples in the rare class: Σ wl / Σ w over a block has no batch."""
    random, size, count, blocks = np.random.default_rng(0), 128, 8, 64
    rare = random.random(size * count * blocks) < 0.02
    weights = np.where(rare, 49.0, 1.0)
    losses = weights * np.where(rare, 2.0, 0.3) * random.gamma(4, 0.25, len(rare))
    records = []
    for factor in (1, 2, 4, 8):
        sums, totals = (each.reshape(-1, factor * size).sum(1) for each in (losses, weights))
        of_updates = replace(record(factor, sums / totals), weights=totals, global_batch=factor * size)
        records.append(of_updates)
    found = compare_branches(records, size * count)
    for result in found.results[1:]:
        assert result.difference is not None
        assert result.difference.mean == pytest.approx(0, abs=1e-12)
    half = (each.reshape(blocks, -1)[blocks // 2 :].sum(1) for each in (losses, weights))
    assert found.results[0].loss == pytest.approx(float(np.mean(np.divide(*half))))


def test_a_block_has_the_mean_over_its_weight() -> None:
    losses, weights = np.array([1.0, 4.0, 2.0, np.nan]), np.array([30.0, 10.0, 5.0, 0.0])
    found = block_losses(losses, 2, weights)
    assert found[0] == (30 * 1 + 10 * 4) / 40
    assert np.isnan(found[1])


@pytest.mark.parametrize("has_weights", [True, False])
def test_records_of_older_versions_have_a_weight_of_1_per_sample(tmp_path: Path, has_weights: bool) -> None:
    plan = plan_tree(300, 64, seed=1)
    plan["phases"] = [{"start_samples": 0, "lr": 0.1, "global_batch": 32, "num_updates": 2}]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    lines = [{"kind": "train", "samples": 32 * k, "loss": 1.0, "samples_per_s": 9.0, "ranks": 1} for k in (1, 2)]
    if has_weights:
        lines = [line | {"loss_weight": weight} for line, weight in zip(lines, (50.0, 40.5), strict=True)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = read_branch(tmp_path, 1, 0).weights
    assert weights is not None
    assert weights.tolist() == ([50.0, 40.5] if has_weights else [32.0, 32.0])


# --- blocks and verdicts ------------------------------------------------------------------------


def steady(factor: int, loss: float, *, noise: float = 0.01) -> BranchRecord:
    """A branch of 32 blocks of 128 samples with a loss that is far off in the first half."""
    random = np.random.default_rng(factor)
    losses = loss + noise * random.standard_normal(32 * 4 // factor)
    losses[: len(losses) // 2] += 10 * factor
    return record(factor, losses)


def test_the_loss_is_the_mean_over_the_second_half() -> None:
    assert block_losses(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [2.0, 6.0]
    found = compare_branches([steady(1, 0.5, noise=0), steady(2, 0.75, noise=0)], 128)
    assert [result.loss for result in found.results] == [0.5, 0.75]
    assert found.results[1].difference is not None
    assert found.results[1].difference.mean == pytest.approx(0.25)
    assert found.results[1].difference.n == 16


def test_the_critical_batch_ends_at_the_first_worse_branch() -> None:
    found = compare_branches([steady(1, 0.5), steady(2, 0.6), steady(4, 0.4)], 128)
    assert [result.is_not_worse for result in found.results] == [True, False, True]
    assert found.critical_batch == 32
    assert not found.is_bound
    assert found.verdict().startswith("critical batch: below 64; the run's own batch is 32")


def test_a_batch_that_passes_with_all_is_a_lower_bound() -> None:
    found = compare_branches([steady(1, 0.5), steady(2, 0.5), steady(4, 0.3)], 128)
    assert found.is_bound
    assert found.verdict().startswith("critical batch: at least 128; no branch is worse")


def test_the_tolerance_asks_for_proof() -> None:
    branches = [steady(1, 0.5), steady(2, 0.5, noise=0.1), steady(4, 0.6)]
    by_default, within = compare_branches(branches, 128), compare_branches(branches, 128, 0.01)
    assert [result.is_not_worse for result in by_default.results] == [True, True, False]
    assert [result.is_not_worse for result in within.results] == [True, False, False]  # too noisy to prove it
    assert by_default.verdict().startswith("critical batch: 64; 128 is worse")
    assert compare_branches(branches, 128, 0.2).is_bound


def test_a_branch_that_diverges_is_worse() -> None:
    diverged = steady(2, 0.4)
    diverged.losses[-1] = math.nan
    found = compare_branches([steady(1, 0.5), diverged], 128)
    assert found.results[1].difference is None
    assert found.critical_batch == 32
    with pytest.raises(RunError, match="the run's own batch is not finite"):
        compare_branches([diverged, steady(4, 0.5)], 128)


def test_few_blocks_are_reported_with_the_samples_that_suffice() -> None:
    lines = compare_branches([steady(1, 0.5), steady(2, 0.5)], 128).explanation(128)
    assert "16 blocks of 128" in lines[0]
    assert lines[1].endswith("32 take --samples 8192")


def test_a_noisy_branch_passes_with_the_amount_by_which_it_may_be_worse() -> None:
    branches = [steady(1, 0.5), steady(2, 0.6, noise=2.0)]
    found = compare_branches(branches, 128)
    assert found.is_bound
    difference = found.results[1].difference
    assert difference is not None
    assert difference.high > 0.3
    may_be = f"may still be worse by up to {difference.high:.4g}, the upper end of its interval"
    assert any(may_be in line for line in found.explanation(128))
    assert not any("may still be worse" in line for line in compare_branches(branches, 128, 9.0).explanation(128))


def test_held_out_losses_are_compared_sample_by_sample() -> None:
    each = np.random.default_rng(3).exponential(1.0, 400).astype(np.float32)
    shift = np.random.default_rng(4).normal(0.02, 0.01, 400).astype(np.float32)
    first = record(1, np.ones(8), float(each.mean()), Outcomes(9, each))
    second = record(2, np.ones(4), float((each + shift).mean()), Outcomes(9, each + shift))
    found = held_out_difference(second, first)
    assert found is not None
    assert found.mean == pytest.approx(float(shift.mean()), abs=1e-6)
    assert found.half_width == pytest.approx(1.96 * 0.01 / 20, rel=0.15)


def test_weighted_held_out_losses_are_divided_by_the_total_weight() -> None:
    weights = np.array([1, 3, 1, 5], dtype=np.float32)
    losses = [np.array(values, dtype=np.float32) for values in ([1, 1, 1, 1], [2, 1, 4, 1])]
    records = [record(k + 1, np.ones(8), 0.0, Outcomes(9, each, None, weights)) for k, each in enumerate(losses)]
    found = held_out_difference(records[1], records[0])
    assert found is not None
    assert found.mean == pytest.approx((1 + 3) / 10)


def test_a_sample_that_only_one_branch_has_skipped_leaves_no_interval() -> None:
    both, one = np.array([1, np.nan, 3, 4], np.float32), np.array([1, 2, 3, 4], np.float32)
    second = record(2, np.ones(4), 1.5, Outcomes(9, np.array([0.5, np.nan, 2, 2], np.float32)))
    found = held_out_difference(second, record(1, np.ones(8), 2.0, Outcomes(9, both)))
    assert found is not None
    assert found.mean == pytest.approx((-0.5 - 1 - 2) / 3)
    found = held_out_difference(second, record(1, np.ones(8), 2.0, Outcomes(9, one)))
    assert found is not None
    assert (found.mean, found.low, found.high) == (-0.5, None, None)


def test_without_losses_per_sample_only_the_means_differ() -> None:
    found = held_out_difference(record(2, np.ones(4), 0.75), record(1, np.ones(8), 0.5))
    assert found is not None
    assert (found.mean, found.low, found.high) == (0.25, None, None)
    assert held_out_difference(record(2, np.ones(4), math.nan), record(1, np.ones(8), 0.5)) is None
