"""tr(Σ) and |G|² from the gradients of passes: unbiased, with an interval, without a value if undefined."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.train.update.gradient_noise import GradientNoiseScale, NoiseAverage, NoiseEstimate, estimate
from hvd_batchgrow.train.update.gradient_norms import ALL, GradientNorms, squared_norm

SIZES = (3, 5, 8, 16)
"""Samples of the passes of an update: b_i."""


def draws(num_updates: int, signal: float, trace: float, seed: int) -> NDArray[np.float64]:
    """(updates, passes, 12) mean gradients of passes of SIZES samples: |G|² = signal, tr(Σ) = trace."""
    draw, dims = np.random.default_rng(seed), 12
    mean = np.full(dims, math.sqrt(signal / dims))
    scales = np.sqrt(trace * np.arange(1, dims + 1) / sum(range(1, dims + 1)))
    noise = draw.standard_normal((num_updates, len(SIZES), dims)) * scales
    return mean + noise / np.sqrt(SIZES)[:, None]


def estimates_of(gradients: NDArray[np.float64], sizes: Sequence[int] = SIZES) -> list[NoiseEstimate]:
    found = []
    for passes in gradients:
        mean = np.average(passes, axis=0, weights=sizes)
        weighted = float((np.array(sizes) * (passes**2).sum(1)).sum())
        seen = estimate(weighted, len(sizes), sum(sizes), float(mean @ mean))
        assert seen is not None
        found.append(seen)
    return found


# --- one update -------------------------------------------------------------------------------------


def test_an_estimate_is_the_weighted_variance_of_the_passes_gradients() -> None:
    """Σ bᵢ |gᵢ - g|² / (k - 1), the definition that the formula is a short cut of."""
    for passes, seen in zip(gradients := draws(20, 1.0, 30.0, 0), estimates_of(gradients), strict=True):
        mean = np.average(passes, axis=0, weights=SIZES)
        spread = sum(b * float((g - mean) @ (g - mean)) for b, g in zip(SIZES, passes, strict=True))
        trace = spread / (len(SIZES) - 1)
        assert seen.trace == pytest.approx(trace, rel=1e-10)
        assert seen.squared_norm == pytest.approx(float(mean @ mean) - trace / sum(SIZES), rel=1e-10)


@pytest.mark.slow
def test_estimates_have_no_bias_for_passes_of_unequal_sizes() -> None:
    found = estimates_of(draws(40_000, signal=2.0, trace=50.0, seed=1))
    assert np.mean([seen.trace for seen in found]) == pytest.approx(50.0, rel=0.01)
    assert np.mean([seen.squared_norm for seen in found]) == pytest.approx(2.0, rel=0.01)


def test_one_gradient_has_no_spread() -> None:
    assert estimate(10.0, 1, 8, 1.0) is None


@pytest.mark.parametrize("unit", [1, 8, 64])
@pytest.mark.parametrize("kind", ["class weights", "tokens"])
def test_estimates_have_no_bias_with_weights(kind: str, unit: int) -> None:
    """Given the weights w, Var(g) is Σ Var(s)/W², and Var(s) is 20 w² for class weights and 20 w for tokens."""
    draw, batch, dims, signal = np.random.default_rng(4), 256, 20, 0.3
    seen, true = [], []
    for _ in range(400):
        if kind == "tokens":
            weights = draw.integers(8, 257, batch).astype(float)
            variances = weights
        else:
            weights = np.where(draw.random(batch) < 0.02, 49.0, 1.0)
            variances = weights**2
        sums = signal * weights[:, None] + np.sqrt(variances)[:, None] * draw.standard_normal((batch, dims))
        whole = weights.sum()
        mean = sums.sum(0) / whole
        of_units, unit_weights = sums.reshape(-1, unit, dims).sum(1), weights.reshape(-1, unit).sum(1)
        squares = (batch / whole) ** 2 * float((of_units**2).sum()) / unit
        imbalance = batch / whole**2 * float((unit_weights**2).sum()) / unit
        found = estimate(squares, batch // unit, batch, float(mean @ mean), imbalance)
        assert found is not None
        seen.append(found)
        true.append(dims * batch * variances.sum() / whole**2)
    # Four standard errors; those of norms include the spread of g, those of traces are of the differences.
    error = float(4 * np.std([s.trace - t for s, t in zip(seen, true, strict=True)]) / 20)
    assert np.mean([s.trace for s in seen]) == pytest.approx(np.mean(true), abs=error)
    assert error < 0.12 * np.mean(true)
    norms = [s.squared_norm for s in seen]
    assert np.mean(norms) == pytest.approx(dims * signal**2, abs=float(4 * np.std(norms) / 20))


def test_parts_have_no_spread_if_one_has_nearly_all_the_weight() -> None:
    """Two parts of 8 samples and the weights w and 1: c = 16/(w + 1)² (w² + 1)/8, k - c = 4w/(w + 1)²."""
    for weight, has_estimate in ((5.0, True), (6.0, False), (math.inf, False)):
        share = 1 / (weight + 1)
        imbalance = 2 * ((1 - share) ** 2 + share**2)
        assert (estimate(10.0, 2, 16, 1.0, imbalance) is not None) == has_estimate


# --- averages ---------------------------------------------------------------------------------------


def averaged(seen: Sequence[NoiseEstimate], samples: Sequence[int], memory: float = 1000.0) -> GradientNoiseScale:
    average = NoiseAverage(memory)
    for one, count in zip(seen, samples, strict=True):
        average.add(one, count)
    assert average.value is not None
    return average.value


def test_an_average_of_equal_estimates_is_that_estimate_from_the_first_on() -> None:
    seen = NoiseEstimate(6.0, 0.25)
    for count in (1, 2, 50):
        value = averaged([seen] * count, [32] * count)
        assert (value.trace, value.squared_norm) == pytest.approx((6.0, 0.25))
        assert value.b_simple == pytest.approx(24.0)


def test_the_memory_is_in_samples_whatever_the_updates() -> None:
    old, new = NoiseEstimate(1.0, 1.0), NoiseEstimate(3.0, 2.0)
    whole = averaged([old, new], [100, 64])
    halves = averaged([old, new, new], [100, 32, 32])
    assert (whole.trace, whole.squared_norm) == pytest.approx((halves.trace, halves.squared_norm), rel=1e-12)
    # The weights of an update over s samples: 1 - e^(-s/memory), and e^(-s/memory) for each that came after.
    kept = math.exp(-0.064)
    weights = np.array([(1 - math.exp(-0.1)) * kept, 1 - kept])
    assert whole.trace == pytest.approx(float(weights @ [1.0, 3.0] / weights.sum()), rel=1e-12)


def test_a_batch_that_grows_resets_nothing() -> None:
    before, after = NoiseEstimate(10.0, 1.0), NoiseEstimate(20.0, 1.0)
    value = averaged([before] * 50 + [after], [16] * 50 + [160])
    assert 10.0 < value.trace < 14.0
    assert value.low is not None  # the updates before still count


def test_an_average_of_no_values_is_undefined() -> None:
    assert NoiseAverage(10.0).value is None


def test_the_state_goes_through_a_checkpoint() -> None:
    whole, found = NoiseAverage(500.0), estimates_of(draws(30, 1.0, 40.0, 2))
    for seen in found[:20]:
        whole.add(seen, 32)
    again = NoiseAverage(500.0)
    again.load(whole.state())
    for average in (whole, again):
        for seen in found[20:]:
            average.add(seen, 64)
    assert again.value == whole.value


# --- the interval -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_interval_holds_the_true_ratio_19_times_in_20() -> None:
    trace, signal, num_updates, num_runs = 40.0, 4.0, 120, 400
    found = estimates_of(draws(num_updates * num_runs, signal, trace, 3))
    hits = 0
    for run in range(num_runs):
        value = averaged(found[run * num_updates : (run + 1) * num_updates], [32] * num_updates, memory=1e9)
        assert value.low is not None
        assert value.high is not None
        assert value.b_simple is not None
        assert value.low < value.b_simple < value.high
        hits += value.low <= trace / signal <= value.high
    assert 0.92 <= hits / num_runs <= 0.98


def correlated(num_updates: int, signal: float, seed: int = 7) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """tr(Σ) and |G|² of updates, whose errors are correlated."""
    first, second = np.random.default_rng(seed).standard_normal((2, num_updates))
    return 40 + 8 * first, signal + 0.5 * first + 0.5 * second


def mean_and_error(values: NDArray[np.float64], memory: float) -> tuple[float, float]:
    """The mean over updates of 32 samples, with weights that fall by e^(-32/memory), and its standard error.

    The variance of the mean is that of one value over n - 1, where n = (Σ w)²/Σ w².
    """
    weights = np.exp(-32 * np.arange(len(values))[::-1] / memory)
    mean = np.average(values, weights=weights)
    num_updates = weights.sum() ** 2 / (weights**2).sum()
    return mean, (np.average((values - mean) ** 2, weights=weights) / (num_updates - 1)) ** 0.5


@pytest.mark.parametrize(("num_updates", "memory"), [(12, 1e5), (40, 200.0)])
def test_ends_are_fiellers_roots(num_updates: int, memory: float) -> None:
    """At an end ρ, the mean of s - ρ g is 1.96 of its standard errors from 0."""
    s, g = correlated(num_updates, signal=4.0)
    if memory == 1e5:  # nearly equal weights
        assert mean_and_error(s, memory)[1] == pytest.approx(s.std(ddof=1) / 12**0.5, rel=1e-3)
    value = averaged([NoiseEstimate(a, b) for a, b in zip(s, g, strict=True)], [32] * num_updates, memory)
    assert value.low is not None
    assert value.high is not None
    for end, sign in ((value.low, 1), (value.high, -1)):
        mean, error = mean_and_error(s - end * g, memory)
        assert mean == pytest.approx(sign * 1.96 * error, rel=1e-9)


@pytest.mark.parametrize("share", [0.5, 1 - 1e-10])
def test_without_an_upper_end_the_lower_one_is_a_root_too(share: float) -> None:
    """|G|² is just this share of 1.96 standard errors above 0, so it may be 0."""
    s, g = correlated(12, signal=4.0)
    mean, error = mean_and_error(g, 1e3)
    g += share * 1.96 * error - mean
    value = averaged([NoiseEstimate(a, b) for a, b in zip(s, g, strict=True)], [32] * 12, memory=1e3)
    assert value.high is None
    assert value.low is not None
    mean, error = mean_and_error(s - value.low * g, 1e3)
    assert mean == pytest.approx(1.96 * error, rel=1e-9)


def test_a_norm_that_may_be_0_leaves_no_upper_end() -> None:
    trace, signal = 400.0, 0.02
    found = estimates_of(draws(60, signal, trace, 4))
    value = averaged(found, [32] * 60, memory=1e9)
    assert value.high is None
    assert value.low is not None
    assert 0 < value.low < trace / signal


def test_too_few_updates_have_no_interval() -> None:
    found = estimates_of(draws(7, 4.0, 40.0, 5))
    value = averaged(found, [32] * 7, memory=1e9)
    assert (value.low, value.high) == (None, None)


@pytest.mark.parametrize("norm", [0.0, -0.5])
def test_a_norm_of_0_or_less_has_no_ratio(norm: float) -> None:
    value = averaged([NoiseEstimate(5.0, norm + 0.01 * (k % 3 - 1)) for k in range(30)], [8] * 30)
    assert value.squared_norm == pytest.approx(norm, abs=1e-3)
    if value.squared_norm <= 0:
        assert value.b_simple is None
    assert averaged([NoiseEstimate(5.0, -0.5)], [8]).b_simple is None
    assert averaged([NoiseEstimate(5.0, 0.0)], [8]).b_simple is None
    assert averaged([NoiseEstimate(-5.0, 1.0)], [8]).b_simple is None


def test_no_end_of_an_interval_is_below_0_nor_before_the_other() -> None:
    draw = np.random.default_rng(6)
    for _ in range(500):
        trace, norm = draw.normal(0, 1, 2)
        seen = [NoiseEstimate(trace + a, norm + b) for a, b in draw.normal(0, draw.uniform(0.01, 3), (12, 2))]
        value = averaged(seen, [8] * 12, memory=1e9)
        assert value.low is None or value.low >= 0
        assert value.high is None or value.low is None or value.low <= value.high


# --- norms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1023, 1024, 100_003])
def test_a_squared_norm_is_good_to_float64_but_for_its_rows(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1e-3
    expected = float(values.double().square().sum())
    assert float(squared_norm(values)) == pytest.approx(expected, rel=3e-7)
    assert float(squared_norm(values.double())) == pytest.approx(expected, rel=1e-12)


def test_rows_round_no_more_the_more_of_them_there_are() -> None:
    # A single float32 sum of so many equal squares is off by more than 1e-5.
    assert float(squared_norm(torch.full((1 << 22,), 0.1))) == pytest.approx(
        float(np.float32(0.1)) ** 2 * 2**22, rel=1e-6
    )


class Net(nn.Module):
    """A network of two children, one of them with two layers, and a direct parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
        self.head = nn.Linear(2, 5)
        self.gain = nn.Parameter(torch.ones(3))


def flat(parameters: Sequence[nn.Parameter], gradients: dict[nn.Parameter, Tensor]) -> Tensor:
    """A bucket: each gradient in the order of its parameter's memory."""
    pieces = [torch.empty_like(p).copy_(gradients[p]).as_strided((p.numel(),), (1,)) for p in parameters]
    return torch.cat(pieces)


def gradients_of(model: nn.Module, seed: int) -> dict[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {p: torch.randn(p.shape, generator=generator) for p in model.parameters()}


def measured(
    norms: GradientNorms, buckets: Sequence[Sequence[nn.Parameter]], passes: Sequence[dict[nn.Parameter, Tensor]]
) -> dict[str, NoiseEstimate]:
    """Of passes of SIZES samples, whose mean gradients these are."""
    ranks = SingleRank()
    norms.begin()
    for mean, size in zip(passes, SIZES, strict=False):
        for index, bucket in enumerate(buckets):
            norms.add(index, flat(bucket, mean) * size, size, size)
    norms.start(ranks)
    sizes, batch = SIZES[: len(passes)], sum(SIZES[: len(passes)])
    whole = {p: sum(b * g[p] for b, g in zip(sizes, passes, strict=True)) / batch for p in passes[0]}
    return norms.finish(ranks, [flat(bucket, whole) for bucket in buckets], batch, batch, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("exact", [False, True])
def test_weights_are_measured_as_the_formula_says(exact: bool) -> None:
    model, weights, ranks = Net(), (2.5, 40.0, 8.0), SingleRank()
    buckets = [list(model.parameters())]
    sums = [flat(buckets[0], gradients_of(model, seed)) * weight for seed, weight in enumerate(weights)]
    norms = GradientNorms(buckets, exact=exact)
    norms.begin(6)
    for one, weight, size in zip(sums, weights, SIZES, strict=False):
        norms.add(0, one, torch.tensor(weight, dtype=torch.float64), size)
    norms.start(ranks)
    batch, whole = 16, 50.5
    mean = torch.stack(sums).sum(0) / whole
    found = norms.finish(ranks, [mean], batch, whole, 1.0)[ALL]
    squares = sum(float(one.double() @ one.double()) / size for one, size in zip(sums, SIZES, strict=False))
    c = batch / whole**2 * (2.5**2 / 3 + 40**2 / 5 + 8**2 / 8)
    norm = float(mean.double() @ mean.double())
    trace = ((batch / whole) ** 2 * squares - c * batch * norm) / (3 - c)
    close(found, NoiseEstimate(trace, norm - trace / batch))


def test_in_exact_mode_squares_that_do_not_fit_give_no_estimate() -> None:
    model = Net()
    buckets = [list(model.parameters())]
    passes = [{p: 1e8 * g for p, g in gradients_of(model, seed).items()} for seed in range(3)]
    assert measured(GradientNorms(buckets, exact=True), buckets, passes) == {}
    assert ALL in measured(GradientNorms(buckets), buckets, passes)


def expected(values: Sequence[Sequence[Tensor]]) -> NoiseEstimate:
    """From the definition, of the mean gradient of each pass as a list of tensors."""
    gradients = np.stack([torch.cat([v.flatten() for v in one]).double().numpy() for one in values])
    return estimates_of(gradients[None], SIZES[: len(values)])[0]


def close(seen: NoiseEstimate, wanted: NoiseEstimate, rel: float = 1e-5) -> None:
    assert seen.trace == pytest.approx(wanted.trace, rel=rel)
    assert seen.squared_norm == pytest.approx(wanted.squared_norm, rel=rel, abs=rel * wanted.trace)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layer_groups_add_up_to_the_whole(exact: bool, channels_last: bool) -> None:
    model = Net()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(model.parameters())
    buckets = [parameters[:3], parameters[3:]]  # the body lies in both
    names = {p: name.partition(".")[0] for name, p in model.named_parameters()}
    passes = [gradients_of(model, seed) for seed in range(3)]
    found = measured(GradientNorms(buckets, groups=names, exact=exact), buckets, passes)
    assert found.keys() == {ALL, "body", "head", "gain"}
    for name, seen in found.items():
        members = [p for p in parameters if name in (ALL, names[p])]
        close(seen, expected([[one[p] for p in members] for one in passes]))
    parts = [seen for name, seen in found.items() if name != ALL]
    assert sum(part.trace for part in parts) == pytest.approx(found[ALL].trace, rel=1e-10)
    assert sum(part.squared_norm for part in parts) == pytest.approx(found[ALL].squared_norm, rel=1e-8, abs=1e-8)


def test_a_child_named_all_is_not_taken_for_the_whole() -> None:
    model = nn.ModuleDict({"all": nn.Linear(3, 2), "rest": nn.Linear(2, 2)})
    buckets = [list(model.parameters())]
    names = {p: name.partition(".")[0] for name, p in model.named_parameters()}
    passes = [gradients_of(model, seed) for seed in range(3)]
    found = measured(GradientNorms(buckets, groups=names), buckets, passes)
    close(found[ALL], expected([[one[p] for p in buckets[0]] for one in passes]))


@pytest.mark.parametrize("contiguous_state", [False, True])
def test_a_preconditioned_norm_is_that_of_the_gradient_as_adam_scales_it(contiguous_state: bool) -> None:
    """In channels_last too, and where a checkpoint has brought Adam's state back in another order of memory."""
    model = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    adam = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-3)
    seconds = {p: torch.zeros(p.shape) for p in model.parameters()}
    for step in range(3):
        for parameter, gradient in gradients_of(model, 50 + step).items():
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            seconds[parameter] = 0.99 * seconds[parameter] + 0.01 * gradient.square()
        adam.step()
    if contiguous_state:
        for state in adam.state.values():
            state["exp_avg_sq"] = state["exp_avg_sq"].contiguous()
    scales = {p: 1 / ((v / (1 - 0.99**3)).sqrt() + 1e-3) for p, v in seconds.items()}
    buckets = [list(model.parameters())]
    passes = [gradients_of(model, seed) for seed in range(3)]
    found = measured(GradientNorms(buckets, adam=adam), buckets, passes)
    close(found[ALL], expected([[one[p] * scales[p] for p in buckets[0]] for one in passes]), rel=1e-4)


def test_values_without_an_earlier_gradient_do_not_count() -> None:
    """An embedding in which two of five tokens have occurred: the others have v̂ = 0, and the scale 1/eps."""
    model = nn.Embedding(5, 3)
    weight: nn.Parameter = next(model.parameters())
    adam = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    first = torch.zeros(5, 3)
    first[:2] = gradients_of(model, 50)[weight][:2]
    weight.grad = first.clone()
    adam.step()  # v̂ = first²
    buckets = [list(model.parameters())]
    passes = [gradients_of(model, seed) for seed in range(3)]
    found = measured(GradientNorms(buckets, adam=adam), buckets, passes)
    close(found[ALL], expected([[one[weight][:2] / (first[:2].abs() + 1e-8)] for one in passes]), rel=1e-4)


def test_before_adams_first_step_gradients_are_taken_as_they_are() -> None:
    model = Net()
    buckets = [list(model.parameters())]
    passes = [gradients_of(model, seed) for seed in range(2)]
    norms = GradientNorms(buckets, adam=torch.optim.Adam(model.parameters()))
    assert measured(norms, buckets, passes) == measured(GradientNorms(buckets), buckets, passes)


def test_a_single_pass_gives_no_estimate() -> None:
    model = Net()
    buckets = [list(model.parameters())]
    assert measured(GradientNorms(buckets), buckets, [gradients_of(model, 0)]) == {}
