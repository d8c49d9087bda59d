"""Ghost norm's Triton kernels, on a GPU or in the interpreter, against PyTorch's operations in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.nn.ghost import ghost_reference, ghost_tiles

pytest.importorskip("triton", reason="Triton is not installed")
from hvd_batchgrow.nn.ghost import ghost_triton  # imports Triton

GHOST, EPS = 4, 1e-5


class Case(NamedTuple):
    """An input, and the limits that decide its tiles; by default one tile has all values of its channels."""

    shape: tuple[int, ...]
    channels_last: bool = False
    whole: int = 2**14
    tile: int = 2**12
    splits: int = 64


CASES = {
    "rows": Case((8, 3, 5, 5)),
    "rows, a tile each split": Case((8, 3, 5, 5), whole=16, tile=64),
    "rows, two tiles each split": Case((8, 3, 5, 5), whole=16, tile=16, splits=4),
    "short rows": Case((8, 5, 2, 1)),
    "columns": Case((8, 5, 3, 7), channels_last=True),
    "columns, a tile each split": Case((8, 5, 3, 7), channels_last=True, whole=16, tile=256),
    "columns, three tiles each split": Case((8, 5, 3, 7), channels_last=True, whole=16, tile=64, splits=4),
    "more channels than a tile's": Case((8, 35, 2, 2), channels_last=True, whole=64, tile=64),
    "no maps": Case((8, 21)),
    "one channel": Case((8, 1, 5, 3)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec and "case" in callspec.params:
        case = callspec.params["case"]
        limits = {"_WHOLE": case.whole, "_TILE": case.tile, "_MAX_SPLITS": case.splits, "_PARTS_SHARE": 100}
        for name, value in limits.items():
            monkeypatch.setattr(ghost_tiles, name, value)


def drawn(case: Case, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if case.channels_last else x
    return x.to(device, dtype)


def parameters(num_channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    weight, bias = torch.rand(2, num_channels, generator=generator).to(device)
    return (weight + 0.5).requires_grad_(), (bias - 0.5).requires_grad_()


def results(x: Tensor, weight: Tensor | None, bias: Tensor | None, upstream: Tensor, *, relu: bool) -> list[Tensor]:
    """Return output, statistics and gradients of the kernels."""
    leaf = x.detach().requires_grad_()
    wanted = [tensor for tensor in (leaf, weight, bias) if tensor is not None]
    y, statistics = ghost_triton.normalize(leaf, weight, bias, len(x) // GHOST, EPS, relu=relu)
    return [y, statistics, *torch.autograd.grad(y, wanted, upstream)]


def expected_results(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, upstream: Tensor, *, relu: bool
) -> list[Tensor]:
    """Return the same results by PyTorch's operations in float64."""
    leaf, weight, bias = (None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias))
    assert leaf is not None
    wanted = [tensor for tensor in (leaf, weight, bias) if tensor is not None]
    y, statistics = ghost_reference.normalize(leaf, weight, bias, len(x) // GHOST, EPS, relu=relu)
    return [y, statistics, *torch.autograd.grad(y, wanted, upstream.double())]


@every_case
@pytest.mark.parametrize(("affine", "relu"), [(True, True), (False, False)])
def test_output_statistics_and_gradients_are_those_of_pytorch(
    case: Case, device: torch.device, affine: bool, relu: bool
) -> None:
    x, upstream = drawn(case, device), drawn(case, device, seed=3)
    weight, bias = parameters(case.shape[1], device) if affine else (None, None)
    got = results(x, weight, bias, upstream, relu=relu)
    right = expected_results(x, weight, bias, upstream, relu=relu)
    assert [tensor.dtype for tensor in got] == [torch.float32] * len(right)
    assert got[0].stride() == got[2].stride() == x.stride()
    for value, expected in zip(got, right, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", [CASES["rows"], CASES["columns, a tile each split"]])
def test_weight_and_bias_may_be_views(case: Case, device: torch.device) -> None:
    """The defect: the kernels read the values between those of the views."""
    x, upstream = drawn(case, device), drawn(case, device, seed=3)
    of = parameters(case.shape[1], device)
    weight, bias = (torch.stack((p.detach(), p.detach() + 9), 1)[:, 0].requires_grad_() for p in of)
    assert not weight.is_contiguous()
    found, right = results(x, weight, bias, upstream, relu=True), results(x, *of, upstream, relu=True)
    for value, expected in zip(found, right, strict=True):
        assert torch.equal(value, expected)


@every_case
@pytest.mark.parametrize("relu", [True, False])
def test_the_kept_sums_are_the_gradients_of_single_ghost_batches(case: Case, device: torch.device, relu: bool) -> None:
    x, upstream = drawn(case, device), drawn(case, device, seed=3)
    weight, bias = parameters(case.shape[1], device)
    kept: list[Tensor] = []
    y, _ = ghost_triton.normalize(x, weight, bias, len(x) // GHOST, EPS, relu=relu, keep_sums=kept.append)
    torch.autograd.grad(y, (weight, bias), upstream)
    (sums,) = kept
    for k, found in enumerate(sums):
        rows = slice(k * GHOST, (k + 1) * GHOST)
        *_, of_weight, of_bias = expected_results(x[rows], weight, bias, upstream[rows], relu=relu)
        torch.testing.assert_close(found.double(), torch.stack((of_weight, of_bias)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES["rows"], CASES["columns, a tile each split"]])
def test_16_bit_inputs_have_float32_statistics(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    x, upstream = (drawn(case, device) * 100).to(dtype), drawn(case, device, dtype, seed=3)
    assert (x.double() ** 2).max() > torch.finfo(torch.float16).max
    of = parameters(case.shape[1], device)
    got, right = results(x, *of, upstream, relu=True), expected_results(x, *of, upstream, relu=True)
    assert [tensor.dtype for tensor in got] == [dtype, torch.float32, dtype, torch.float32, torch.float32]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[0].double(), right[0], rtol=eps, atol=eps)
    torch.testing.assert_close(got[1].double(), right[1], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got[2].double(), right[2], rtol=eps, atol=eps)
    torch.testing.assert_close([grad.double() for grad in got[3:]], right[3:], rtol=1e-5, atol=1e-3)


@every_case
def test_a_ghost_batch_is_bit_identical_alone_and_among_others(case: Case, device: torch.device) -> None:
    x, upstream = drawn(case, device), drawn(case, device, seed=3)
    of = parameters(case.shape[1], device)
    both = results(x, *of, upstream, relu=True)[:3]
    alone = [results(x[k : k + GHOST], *of, upstream[k : k + GHOST], relu=True)[:3] for k in (0, GHOST)]
    for whole, parts in zip(both, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


@every_case
def test_a_large_mean_does_not_cancel_the_variance(case: Case, device: torch.device) -> None:
    x = (drawn(case, device).double() - 1).div(3).add(1000).float()
    statistics = ghost_triton.normalize(x, None, None, 2, EPS)[1]
    groups = x.double().unflatten(0, (2, GHOST)).movedim(2, 1).flatten(2)
    torch.testing.assert_close(statistics[:, 0].double(), groups.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics[:, 1].double(), groups.var(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("case", [CASES["rows"], CASES["columns, a tile each split"]])
def test_a_nan_is_not_hidden_by_the_relu(case: Case, device: torch.device) -> None:
    x, upstream = drawn(case, device), drawn(case, device, seed=3)
    x[0, 1] = float("nan")
    y, _, grad = results(x, None, None, upstream, relu=True)
    assert y[:GHOST, 1].isnan().all()
    assert grad[:GHOST, 1].isnan().all()
    y[:GHOST, 1] = grad[:GHOST, 1] = 0
    assert y.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_inputs_with_gaps_and_gradients_of_another_layout_are_accepted(
    device: torch.device, channels_last: bool
) -> None:
    wide = drawn(Case((8, 6, 3, 5), channels_last), device)
    gaps, dense = wide[:, :3], wide[:, :3].contiguous()
    of = parameters(3, device)
    other = drawn(Case((8, 3, 3, 5), not channels_last), device, seed=3)
    got, right = results(gaps, *of, other, relu=False), results(dense, *of, other.contiguous(), relu=False)
    torch.testing.assert_close(got, right)
    ones = torch.ones((), device=device).expand(8, 3, 3, 5)
    torch.testing.assert_close(results(gaps, *of, ones, relu=False)[3], results(dense, *of, ones, relu=False)[3])


def test_gradients_have_the_parameters_types_and_only_required_ones_are_returned(device: torch.device) -> None:
    x = drawn(CASES["no maps"], device)
    weight, bias = (tensor.detach().bfloat16() for tensor in parameters(21, device))
    y, statistics = ghost_triton.normalize(x, weight.requires_grad_(), bias, 2, EPS)
    assert not statistics.requires_grad
    y.sum().backward()
    assert (weight.grad is not None and weight.grad.dtype, bias.grad) == (torch.bfloat16, None)


def test_a_second_derivative_is_refused_rather_than_wrong(device: torch.device) -> None:
    x = drawn(CASES["no maps"], device).requires_grad_()
    y, _ = ghost_triton.normalize(x, None, None, 2, EPS)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_next_layer_may_work_in_place(device: torch.device) -> None:
    x = drawn(CASES["rows"], device).requires_grad_()
    of_relu, of_next = (ghost_triton.normalize(x, None, None, 2, EPS, relu=own)[0] for own in (True, False))
    wanted = torch.autograd.grad(of_relu.sum(), x)
    torch.testing.assert_close(torch.autograd.grad(of_next.relu_().sum(), x), wanted)
