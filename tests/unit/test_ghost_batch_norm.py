from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from hvd_batchgrow.nn.ghost.convert import convert_ghost_batch_norm
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, ghost_norms
from hvd_batchgrow.nn.ghost.ghost_choice import by_pytorch_only
from hvd_batchgrow.nn.ghost.norm_group import NormGroup, group_norms

GHOST = 4
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Tolerances for values and gradients of order 1, after sums of at most a few hundred of them."""


class Case(NamedTuple):
    """An input of three ghost batches."""

    shape: tuple[int, ...]
    channels_last: bool = False


CASES = {
    "maps": Case((12, 3, 5, 5)),
    "maps, channels last": Case((12, 3, 5, 5), channels_last=True),
    "small maps": Case((12, 3, 2, 2)),
    "no maps": Case((12, 3)),
    "lines": Case((12, 3, 25)),
    "short lines": Case((12, 3, 2)),
    "lines, channels last": Case((12, 3, 25), channels_last=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(params=["ours", "PyTorch's"])
def arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use the kernels for the input type if there are any, or PyTorch's operations."""
    with by_pytorch_only() if request.param == "PyTorch's" else nullcontext():
        yield


def make(shape: tuple[int, ...] = (12, 3, 5, 5), momentum: float = 0.1, affine: bool = True) -> GhostBatchNorm:
    torch.manual_seed(1)
    kind = GhostBatchNorm2d if len(shape) == 4 else GhostBatchNorm1d
    norm = kind(shape[1], GHOST, momentum=momentum, affine=affine).double()
    for parameter, (low, high) in zip(norm.parameters(), ((0.5, 2), (-1, 1)), strict=False):
        nn.init.uniform_(parameter, low, high)
    return norm


def plain_like(norm: GhostBatchNorm, dimensions: int) -> nn.BatchNorm1d | nn.BatchNorm2d:
    kind = nn.BatchNorm2d if dimensions == 4 else nn.BatchNorm1d
    plain = kind(norm.num_features, eps=norm.eps, momentum=norm.momentum, affine=norm.affine)
    plain.to(norm.running_mean.dtype).load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    return plain


def inputs(shape: tuple[int, ...] = (12, 3, 5, 5), channels_last: bool = False, seed: int = 2) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def grads(y: Tensor, x: Tensor, module: nn.Module) -> list[Tensor]:
    """Return the gradients of the input and all parameters for a random gradient of the output."""
    upstream = inputs(tuple(y.shape), seed=3).to(y.dtype)
    return list(torch.autograd.grad(y, [x, *module.parameters()], upstream))


@pytest.mark.usefixtures("arithmetic")
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("affine", [True, False])
def test_it_is_batch_norm_on_each_ghost_batch(case: Case, dtype: torch.dtype, affine: bool) -> None:
    norm = make(case.shape, affine=affine).to(dtype)
    plain = plain_like(norm, len(case.shape))
    x, same = (inputs(case.shape, case.channels_last).to(dtype).requires_grad_() for _ in range(2))
    y, expected = norm(x), torch.cat([plain(chunk) for chunk in same.split(GHOST)])
    tolerance: dict[str, Any] = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype] * 10}
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(grads(y, x, norm), grads(expected, same, plain), **tolerance)
    torch.testing.assert_close(list(norm.buffers()), list(plain.buffers())[:2], **tolerance)


@every_case
@pytest.mark.parametrize("affine", [True, False])
def test_its_gradient_is_that_of_its_output(case: Case, affine: bool) -> None:
    norm = make(case.shape, affine=affine)
    names = [name for name, _ in norm.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))  # type: ignore[no-any-return]

    arguments = [inputs(case.shape, case.channels_last), *(p.detach().clone() for p in norm.parameters())]
    assert torch.autograd.gradcheck(function, [a.requires_grad_() for a in arguments], fast_mode=True)


@every_case
def test_layout_is_kept_and_the_next_layer_may_work_in_place(case: Case) -> None:
    x = inputs(case.shape, case.channels_last).requires_grad_()
    y = make(case.shape)(x)
    (grad,) = torch.autograd.grad(y.relu_().sum(), x)
    assert y.stride() == grad.stride() == x.stride()


@pytest.mark.parametrize("channels_last", [False, True])
def test_inputs_with_gaps_are_accepted(channels_last: bool) -> None:
    wide = inputs((12, 6, 5, 5), channels_last)
    gaps = wide[:, :3].detach().requires_grad_()
    dense = gaps.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    norm = make()
    y, expected = norm(gaps), norm(dense)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    torch.testing.assert_close(grads(y, gaps, norm), grads(expected, dense, norm))


@pytest.mark.usefixtures("arithmetic")
@every_case
def test_a_ghost_batch_does_not_depend_on_the_others(case: Case) -> None:
    norm, x = make(case.shape).float(), inputs(case.shape, case.channels_last).float()
    two, three = x[:8].clone().requires_grad_(), x.requires_grad_()
    y_of_two, y_of_three = norm(two), norm(three)
    assert torch.equal(y_of_two, y_of_three[:8])
    assert torch.equal(y_of_three, norm(three))
    upstream = inputs(case.shape, seed=3).float()
    of_two, of_three = (torch.autograd.grad(y, x, upstream[: len(y)])[0] for y, x in ((y_of_two, two), (y_of_three, x)))
    assert torch.equal(of_two, of_three[:8])


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 3, 2, 2), (4, 3), (4, 3, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_ghost_batch_is_batch_norm_to_the_bit(shape: tuple[int, ...], channels_last: bool) -> None:
    norm = make(shape).float()
    plain = plain_like(norm, len(shape))
    x = inputs(shape, channels_last).float().requires_grad_()
    y, expected = norm(x), plain(x)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, grads(y, x, norm), grads(expected, x, plain)))


def test_two_ghost_batches_by_hand() -> None:
    # γ = 2, one channel: (1, 3) has mean 2 and variance 1, unbiased 2; (10, 14) has 12 and 4, unbiased 8.
    norm = GhostBatchNorm1d(1, 2, eps=0.0, momentum=0.5)
    with torch.no_grad():
        norm.weight.fill_(3)  # type: ignore[union-attr]
        norm.bias.fill_(1)  # type: ignore[union-attr]
    assert norm(torch.tensor([[1.0], [3.0], [10.0], [14.0]])).flatten().tolist() == [1 - 3, 1 + 3, 1 - 3, 1 + 3]
    assert norm.running_mean.item() == (0 / 2 + 2 / 2) / 2 + 12 / 2
    assert norm.running_var.item() == (1 / 2 + 2 / 2) / 2 + 8 / 2


@given(
    num_ghost_batches=st.integers(1, 4),
    ghost=st.integers(1, 5),
    channels=st.integers(1, 5),
    side=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels_last=st.booleans(),
)
def test_any_shape_by_the_formula(
    num_ghost_batches: int, ghost: int, channels: int, side: tuple[int, int], channels_last: bool
) -> None:
    assume(ghost * side[0] * side[1] > 1)
    x = inputs((num_ghost_batches * ghost, channels, *side), channels_last)
    norm, e = GhostBatchNorm2d(channels, ghost, momentum=0.3).double(), 0.3
    groups = x.reshape(num_ghost_batches, ghost, channels, *side)
    variance, mean = torch.var_mean(groups, (1, 3, 4), correction=0, keepdim=True)
    torch.testing.assert_close(norm(x), ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape))
    running_mean, running_var = torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
    unbiased = groups.var((1, 3, 4))
    for i in range(num_ghost_batches):
        running_mean = (1 - e) * running_mean + e * mean[i].flatten()
        running_var = (1 - e) * running_var + e * unbiased[i]
    torch.testing.assert_close((norm.running_mean, norm.running_var), (running_mean, running_var))


@pytest.mark.usefixtures("arithmetic")
@every_case
def test_a_large_mean_does_not_cancel_the_variance(case: Case) -> None:
    # A float32 near 1000 is accurate to 3e-5. E[x²] - E[x]² would be accurate to only 6e-2, and could be negative.
    norm = GhostBatchNorm(3, GHOST, momentum=1.0)
    x = (inputs(case.shape, case.channels_last) - 1).div(3).add(1000).float()
    last = x[-GHOST:].double().movedim(1, 0).flatten(1)
    expected = (last - last.mean(1, keepdim=True)) / last.var(1, correction=0, keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(norm(x)[-GHOST:].double().movedim(1, 0).flatten(1), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(norm.running_var.double(), last.var(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_16_bit_inputs_have_float32_statistics(dtype: torch.dtype, channels_last: bool) -> None:
    norm, x = make().float(), (inputs(channels_last=channels_last) * 100).to(dtype).requires_grad_()
    assert (x.double() ** 2).max() > torch.finfo(torch.float16).max
    with torch.autocast("cpu", dtype):
        y = norm(x)
    assert (y.dtype, norm.running_var.dtype) == (dtype, torch.float32)
    wide = make()
    same = x.detach().double().requires_grad_()
    tolerance: dict[str, Any] = {
        "rtol": 0,
        "atol": 4 * torch.finfo(dtype).eps * 4,
    }  # values are below 4, and rounded once at the end
    torch.testing.assert_close(y.double(), wide(same), **tolerance)
    torch.testing.assert_close(norm.running_var.double(), wide.running_var, rtol=1e-5, atol=0)
    of_x, *of_parameters = grads(y, x, norm)
    assert of_x.dtype == dtype
    expected, *expected_of_parameters = grads(wide(same), same, wide)
    torch.testing.assert_close(of_x.double(), expected, **tolerance)
    for value, right in zip(of_parameters, expected_of_parameters, strict=True):
        # Sums of 300 upstream gradients of order 3, each rounded.
        torch.testing.assert_close(value.double(), right, rtol=0, atol=300 * 10 * torch.finfo(dtype).eps)


def test_parameters_of_16_bits_have_gradients_of_16_bits() -> None:
    norm = make().bfloat16()
    x = inputs().bfloat16().requires_grad_()
    for samples in (x, x[:GHOST]):
        assert {grad.dtype for grad in grads(norm(samples), x, norm)} == {torch.bfloat16}


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_ghost_batch_with_parameters_of_16_bits_is_batch_norm_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    """An earlier defect: parameters were converted to float32, and values of 4 to 8 differed by 0.03 in bfloat16."""
    norm = make(case.shape).to(dtype)
    plain = plain_like(norm, len(case.shape))
    x, same = (inputs(case.shape, case.channels_last)[:GHOST].to(dtype).requires_grad_() for _ in range(2))
    y, expected = norm(x), plain(same)
    assert torch.equal(y, expected)
    for ours, theirs in zip(grads(y, x, norm), grads(expected, same, plain), strict=True):
        assert torch.equal(ours, theirs)
    # Running statistics come from a forward in float32 and are rounded once.
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(norm.buffers(), plain.buffers(), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=2 * eps)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("num_samples", [GHOST, 2 * GHOST])
def test_an_eps_of_0_works_on_one_ghost_batch_as_on_two(num_samples: int) -> None:
    """An earlier defect: nn.BatchNorm, which normalizes one ghost batch, refuses eps = 0 in training."""
    norm = GhostBatchNorm2d(2, GHOST, eps=0.0)
    x = inputs((num_samples, 2, 3, 3)).float().requires_grad_()
    y, (of_x, *_) = norm(x), grads(norm(x), x, norm)
    chunks = x.detach().double().split(GHOST)
    expected = [(c - c.mean((0, 2, 3), keepdim=True)) / c.std((0, 2, 3), correction=0, keepdim=True) for c in chunks]
    torch.testing.assert_close(y.double(), torch.cat(expected), rtol=0, atol=1e-5)
    # y does not change if a channel of a ghost batch is shifted or scaled
    sums = [
        torch.stack((g.sum((0, 2, 3)), (g * c).sum((0, 2, 3))))
        for g, c in zip(of_x.double().split(GHOST), chunks, strict=True)
    ]
    torch.testing.assert_close(torch.stack(sums), torch.zeros(len(chunks), 2, 2).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("eps", [-1e-5, math.nan])
def test_an_eps_below_0_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps = .* must be >= 0"):
        GhostBatchNorm2d(2, 4, eps=eps)
    network = nn.Sequential(nn.BatchNorm2d(2, eps=eps))
    with pytest.raises(ValueError, match=r"to ghost norms:\n  0: has eps = .*; a ghost norm's must be >= 0"):
        convert_ghost_batch_norm(network, 4)
    assert type(network[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_has_no_gradient(frozen: str) -> None:
    norm = make().requires_grad_(True)
    getattr(norm, frozen).requires_grad_(False)
    norm(inputs()).sum().backward()
    assert {name for name, p in norm.named_parameters() if p.grad is None} == {frozen}


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x = inputs().requires_grad_()
    (grad,) = torch.autograd.grad(make()(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_running_statistics_are_the_recurrence_written_out() -> None:
    norm, e, x = make(momentum=0.3), 0.3, inputs()
    norm(x)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for chunk in x.split(GHOST):
        mean = (1 - e) * mean + e * chunk.mean((0, 2, 3))
        variance = (1 - e) * variance + e * chunk.var((0, 2, 3), unbiased=True)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


@pytest.mark.parametrize("shares", [[[0, 1, 2]], [[0], [1], [2]], [[0, 2], [1]], [[2], [0, 1]]])
@pytest.mark.parametrize("together", [False, True])
def test_deferred_statistics_have_the_same_sum_in_any_division(shares: list[list[int]], together: bool) -> None:
    whole, parts = make(), make()
    whole(inputs())
    parts.deferred = True
    chunks = inputs().split(GHOST)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for slots in shares:
        passes = [slots] if together else [[slot] for slot in slots]
        for one in passes:
            parts(torch.cat([chunks[slot] for slot in one]))
        weights = torch.tensor(parts.weights(slots, 3), dtype=torch.float64)[:, None, None]
        total += (weights * NormGroup([parts]).take_statistics(len(slots))).sum(0)
    assert parts.running_mean.tolist() == [0, 0, 0], "nothing is committed before the update ends"
    NormGroup([parts]).commit(total, 3)
    torch.testing.assert_close(list(parts.buffers()), list(whole.buffers()))


def test_a_norm_that_ran_twice_for_one_ghost_batch_is_refused() -> None:
    norm = make()
    norm.deferred = True
    norm(inputs())
    norm(inputs())
    with pytest.raises(ValueError, match="6 ghost batches seen, 3 expected"):
        NormGroup([norm]).take_statistics(3)
    assert norm.take_statistics().shape == (0, 2, 3)


def test_norms_are_advanced_together_as_they_are_one_by_one() -> None:
    alone, together = [make(), make((12, 5, 5, 5))], [make(), make((12, 5, 5, 5))]
    for norm in together:
        norm.deferred = True
    for ours, theirs, channels in zip(together, alone, (3, 5), strict=True):
        x = inputs((12, channels, 5, 5))
        theirs(x)
        for chunk in x.split(GHOST) if channels == 3 else [x]:  # in other passes
            ours(chunk)
    (group,) = group_norms(together)
    weights = torch.tensor(together[0].weights(range(3), 3), dtype=torch.float64)[:, None, None]
    group.commit((weights * group.take_statistics(3)).sum(0), 3)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))
    together[1].momentum = 0.5
    together[0].eval()
    assert [group.norms for group in group_norms(together)] == [[together[1]]]


@pytest.mark.parametrize("shape", [(5, 3, 5, 5), (5, 3), (5, 3, 7)])
@pytest.mark.parametrize("affine", [True, False])
def test_evaluation_is_batch_norms(shape: tuple[int, ...], affine: bool) -> None:
    norm = make(shape, affine=affine)
    norm(inputs((12, *shape[1:])))
    plain = plain_like(norm, len(shape))
    assert torch.equal(norm.eval()(inputs(shape)), plain.eval()(inputs(shape)))


@pytest.mark.parametrize("samples", [2, 4])
def test_float32_statistics_start_from_clean_memory(samples: int) -> None:
    # The kernel adds 0 times the old value, which would be NaN for a NaN in uninitialized memory.
    norm = GhostBatchNorm2d(3, ghost_batch=2)
    for _ in range(50):
        junk = [torch.full((rows, samples // 2, 3), float("nan")) for rows in (2, 4)]
        del junk
        norm(torch.randn(samples, 3, 2, 2))
        assert norm.running_mean.isfinite().all()
        assert norm.running_var.isfinite().all()


@pytest.mark.parametrize("samples", [0, 3, 6])
def test_an_input_of_broken_ghost_batches_is_refused(samples: int) -> None:
    # (j): a ghost batch larger than the local batch is one of these
    with pytest.raises(ValueError, match=f"{samples} samples are {samples / 4:.2f} ghost batches of 4"):
        make()(inputs((samples, 3, 5, 5)))


@pytest.mark.parametrize(
    ("norm", "shape", "fault"),
    [
        (GhostBatchNorm2d(3, 1), (2, 3, 1, 1), "a ghost batch of 1 sample of 1 pixel has no variance"),
        (GhostBatchNorm2d(3, 1), (2, 3, 5), r"shape \(2, 3, 5\); expected \(n, C, H, W\) with C = 3"),
        (GhostBatchNorm1d(3, 1), (2, 3, 5, 5), r"expected \(n, C\) or \(n, C, L\) with C = 3"),
        (GhostBatchNorm1d(3, 1), (2, 4, 5), r"shape \(2, 4, 5\); expected"),
    ],
)
def test_other_inputs_are_refused(norm: GhostBatchNorm, shape: tuple[int, ...], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        norm(torch.zeros(shape))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"ghost_batch": 0}, "ghost_batch = 0 must be a whole number of samples, 1 or more"),
        ({"ghost_batch": -4}, "ghost_batch = -4 must be"),
        ({"ghost_batch": 2.5}, r"ghost_batch = 2\.5 must be"),
        ({"momentum": None}, r"momentum = None must be in \[0, 1\]"),
        ({"momentum": 1.5}, r"momentum = 1\.5 must be"),
        ({"momentum": -0.1}, r"momentum = -0\.1 must be"),
    ],
)
def test_invalid_arguments_are_refused_by_the_constructor(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        GhostBatchNorm2d(3, **{"ghost_batch": 4, **values})


def test_state_dicts_can_be_exchanged_with_batch_norm() -> None:
    plain, norm = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(GhostBatchNorm2d(3, 4))
    plain(torch.randn(8, 3, 2, 2) * 2 + 1)
    state = plain.state_dict()
    norm.load_state_dict(state)
    assert "0.num_batches_tracked" in state  # the argument is not changed
    assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())
    again = nn.Sequential(nn.BatchNorm2d(3))
    again.load_state_dict(norm.state_dict())
    assert torch.equal(again.get_buffer("0.running_var"), plain.get_buffer("0.running_var"))


@every_case
@pytest.mark.parametrize("training", [False, True])
def test_its_relu_is_a_relu_after_it(case: Case, training: bool) -> None:
    norm, own = make(case.shape).train(training), make(case.shape).train(training)
    own.relu = True
    x, same = (inputs(case.shape, case.channels_last).requires_grad_() for _ in range(2))
    expected, y = norm(x).relu(), own(same)
    assert (y == 0).any()
    assert torch.equal(y, expected)
    assert all(map(torch.equal, grads(y, same, own), grads(expected, x, norm)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of torch.compile
@pytest.mark.parametrize("num_ghost_batches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_compiled_network_gives_the_same(num_ghost_batches: int, dtype: torch.dtype) -> None:
    norm, x = make().to(dtype), inputs((num_ghost_batches * GHOST, 3, 5, 5)).to(dtype).requires_grad_()
    compiled = torch.compile(nn.Sequential(norm, nn.Sigmoid()), backend="eager")
    y, expected = compiled(x), make().to(dtype)(x).sigmoid()
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(each.sum(), x)[0] for each in (y, expected)))


def test_all_its_kinds_are_found_and_shown() -> None:
    model = nn.Sequential(GhostBatchNorm1d(3, 4), nn.ReLU(), GhostBatchNorm2d(3, 4, affine=False), nn.BatchNorm1d(3))
    assert list(ghost_norms(model)) == [model[0], model[2]]
    assert list(model[2].state_dict()) == ["running_mean", "running_var"]
    assert repr(model[2]) == "GhostBatchNorm2d(3, ghost_batch=4, eps=1e-05, momentum=0.1, affine=False)"
    assert repr(GhostBatchNorm1d(3, 4, relu=True)).endswith("momentum=0.1, relu=True)")
