from __future__ import annotations

import _ctypes
import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_batchgrow.nn.ghost import ghost_choice, ghost_cpu, ghost_reference
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.nn.ghost.ghost_reference import normalize as by_pytorch

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("cc") or shutil.which("gcc")
EPS = 1e-5
SHAPES = [
    # ghost batches, samples of each, channels, map
    (2, 2, 3),
    (3, 4, 1, 5, 5),
    (2, 1, 3, 2, 1),  # two values per channel: the fewest that have a variance
    (3, 4, 17, 7, 7),
    (2, 3, 65, 5),  # more channels than are processed together, lines
    (2, 70, 130),  # more rows than a block
    (2, 5, 64, 6, 6),
    (2, 2, 2, 96, 96),  # a row longer than a block
    (2, 300, 2, 6, 6),  # more rows of pixels than a block
]

needs_library = pytest.mark.skipif(COMPILER is None and ghost_cpu.library() is None, reason="no C compiler")


def made(shape: tuple[int, ...], *, channels_last: bool = False, offset: float = 1.0, seed: int = 1) -> Tensor:
    num_ghost_batches, samples, *rest = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_ghost_batches * samples, *rest, generator=generator) * 3 + offset
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def parameters(num_channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(2, num_channels, generator=generator).to(dtype)
    return [weight.requires_grad_(), bias.requires_grad_()]


def everything(
    normalize: ghost_choice.Normalize,
    x: Tensor,
    num_ghost_batches: int,
    *,
    affine: bool = True,
    relu: bool = False,
    upstream: Tensor | None = None,
) -> list[Tensor]:
    """Return output, statistics, and gradients of input and parameters."""
    leaf = x.detach().requires_grad_()
    weight, bias = parameters(x.shape[1], x.dtype) if affine else (None, None)
    y, statistics = normalize(leaf, weight, bias, num_ghost_batches, EPS, relu=relu)
    upstream = made((1, *x.shape), seed=3).to(x.dtype) if upstream is None else upstream
    wanted = [leaf, *(p for p in (weight, bias) if p is not None)]
    return [y.detach(), statistics, *torch.autograd.grad(y, wanted, upstream)]


def test_where_there_is_a_compiler_the_library_is_built() -> None:
    # Otherwise all its tests would be skipped silently. If this fails, run tools/setup.sh.
    assert COMPILER is None or ghost_choice.kernels_for_cpu() == "C"


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("affine", "relu"), [(True, False), (False, False), (True, True)])
def test_it_is_what_float64_gives(shape: tuple[int, ...], channels_last: bool, affine: bool, relu: bool) -> None:
    x = made(shape, channels_last=channels_last)
    ours = everything(ghost_cpu.normalize, x, shape[0], affine=affine, relu=relu)
    right = everything(by_pytorch, x.double(), shape[0], affine=affine, relu=relu)
    # A gradient is a difference of terms of this size, which nearly cancel if two values are close.
    of_terms = 10 * float((right[1][:, 1] + EPS).rsqrt().max())
    for mine, expected in zip(ours, right, strict=True):
        assert mine.dtype == torch.float32
        scale = max(of_terms, float(expected.abs().max()))
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=2e-6 * scale)
    assert ours[0].stride() == ours[2].stride() == x.stride()


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_costs_no_more_than_the_rounding_of_the_input(shape: tuple[int, ...], channels_last: bool) -> None:
    x = made(
        shape, channels_last=channels_last, offset=3000.0
    )  # standard deviation 3; float32 is accurate to 1.2e-4 here
    y, statistics = ghost_cpu.normalize(x, None, None, shape[0], EPS)
    right, moments = by_pytorch(x.double(), None, None, shape[0], EPS)
    scale = float((moments[:, 1] + EPS).rsqrt().max())  # two values may be much closer than 3
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=2.4e-4 * scale)
    torch.testing.assert_close(statistics[:, 1].double(), moments[:, 1], rtol=1e-5, atol=0)


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_ghost_batch_is_bit_identical_alone_and_among_others(shape: tuple[int, ...], channels_last: bool) -> None:
    x, num_ghost_batches = made(shape, channels_last=channels_last), shape[0]
    upstream = made(shape, seed=3)
    y, statistics, grad, *_ = everything(ghost_cpu.normalize, x, num_ghost_batches, upstream=upstream)
    pairs = zip(x.split(shape[1]), upstream.split(shape[1]), strict=True)
    alone = [everything(ghost_cpu.normalize, chunk, 1, upstream=dy) for chunk, dy in pairs]
    assert torch.equal(y, torch.cat([each[0] for each in alone]))
    assert torch.equal(statistics, torch.cat([each[1] for each in alone]))
    assert torch.equal(grad, torch.cat([each[2] for each in alone]))


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(ghost_cpu, "_VALUES_A_THREAD", 1)
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_number_of_threads_is_bit_identical(
    shape: tuple[int, ...], channels_last: bool, request: pytest.FixtureRequest
) -> None:
    x = made(shape, channels_last=channels_last)
    of_one = everything(ghost_cpu.normalize, x, shape[0])
    request.getfixturevalue("many_threads")
    assert all(map(torch.equal, everything(ghost_cpu.normalize, x, shape[0]), of_one))


@needs_library
@pytest.mark.usefixtures("many_threads")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # the test forks a process that has threads
def test_a_fork_has_separate_threads() -> None:
    x = made((4, 2, 3, 4, 4))
    ghost_cpu.normalize(x, None, None, 4, EPS)
    child = os.fork()
    if not child:
        y, _ = ghost_cpu.normalize(x, None, None, 4, EPS)
        os._exit(0 if y.isfinite().all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@given(num_ghost_batches=st.integers(1, 20), num_channels=st.integers(1, 100), num_threads=st.integers(1, 40))
def test_parts_cover_all_channels_and_ghost_batches_once(
    num_ghost_batches: int, num_channels: int, num_threads: int
) -> None:
    parts = ghost_cpu.cut(num_ghost_batches, num_channels, num_threads)
    assert len(parts) <= num_threads
    done = [place for (a, b), (c, d) in parts for place in itertools.product(range(a, b), range(c, d))]
    assert sorted(done) == list(itertools.product(range(num_ghost_batches), range(num_channels)))


@needs_library
@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize("channels_last", [False, True])
def test_processors_without_vectors_are_bit_identical(
    channels_last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "plain.so"
    flags = ["-O1", "-ffp-contract=off", "-DFOR_EACH_PROCESSOR=", "-fPIC", "-shared"]
    source = ROOT / "hvd_batchgrow" / "nn" / "ghost" / "ghost_cpu.c"
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(library), "-lm"], check=True)
    shape = (3, 4, 70, 7, 7)
    x = made(shape, channels_last=channels_last)
    vectorized = everything(ghost_cpu.normalize, x, 3, relu=True)
    monkeypatch.setattr(ghost_cpu, "library", lambda: ghost_cpu.load(str(library)))
    assert all(map(torch.equal, everything(ghost_cpu.normalize, x, 3, relu=True), vectorized))


@needs_library
@pytest.mark.parametrize("normalize", [ghost_cpu.normalize, ghost_reference.normalize])
@pytest.mark.parametrize("relu", [True, False])
def test_the_kept_sums_are_the_gradients_of_single_ghost_batches(normalize: ghost_choice.Normalize, relu: bool) -> None:
    x, upstream = made((3, 4, 5, 6, 6)), made((3, 4, 5, 6, 6), seed=3)
    kept: list[Tensor] = []
    weight, bias = parameters(5)
    y, _ = normalize(x, weight, bias, 3, EPS, relu=relu, keep_sums=kept.append)
    torch.autograd.grad(y, (weight, bias), upstream)
    for found, one, grad in zip(kept[0], x.double().split(4), upstream.double().split(4), strict=True):
        norm = torch.nn.BatchNorm2d(5, EPS, dtype=torch.float64)
        norm.load_state_dict({"weight": weight, "bias": bias}, strict=False)
        wanted = torch.autograd.grad(norm(one).relu() if relu else norm(one), list(norm.parameters()), grad)
        torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
def test_its_relu_is_a_relu_after_it(affine: bool) -> None:
    x = made((2, 4, 3, 5, 5))
    x[0, 0, 0, 0] = float("nan")  # a ReLU passes NaN, forward and backward
    x[:, 1] = 7.0  # the output without bias is 0, where the ReLU's gradient is 0
    own = everything(ghost_cpu.normalize, x, 2, affine=affine, relu=True)
    plain = everything(lambda *args, **_: _then_relu(ghost_cpu.normalize, *args), x, 2, affine=affine)
    for mine, expected in zip(own, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)
    assert (own[0] == 0).any()
    assert own[0][:, 0].isnan().any()


def _then_relu(normalize: ghost_choice.Normalize, *args: object) -> tuple[Tensor, Tensor]:
    y, statistics = normalize(*args, relu=False)  # type: ignore[arg-type]
    return y.relu(), statistics


@needs_library
def test_inputs_and_gradients_of_any_strides_are_accepted() -> None:
    wide = made((2, 4, 6, 5, 5))
    gaps, dense = wide[:, ::2], wide[:, ::2].contiguous()
    assert all(map(torch.equal, everything(ghost_cpu.normalize, gaps, 2), everything(ghost_cpu.normalize, dense, 2)))
    for x in (dense, dense.contiguous(memory_format=torch.channels_last)):
        x = x.detach().requires_grad_()  # noqa: PLW2901
        y, _ = ghost_cpu.normalize(x, None, None, 2, EPS)
        other = torch.channels_last if y.is_contiguous() else torch.contiguous_format
        upstream = made((2, 4, 3, 5, 5), seed=3)
        grads = [
            torch.autograd.grad(y, x, dy, retain_graph=True)[0]
            for dy in (upstream.contiguous(memory_format=other), upstream.contiguous(memory_format=_format(y)))
        ]
        assert torch.equal(*grads)
        expanded, full = torch.ones(1).expand_as(y), torch.ones_like(y)
        assert torch.equal(*(torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in (expanded, full)))


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


@needs_library
def test_parameters_may_be_views_and_of_another_type() -> None:
    x, (weight, bias) = made((2, 4, 3)), parameters(3)
    expected, _ = ghost_cpu.normalize(x, weight, bias, 2, EPS)
    both = torch.stack((weight, bias), 1).double().detach().requires_grad_()
    y, _ = ghost_cpu.normalize(x, both[:, 0], both[:, 1], 2, EPS)
    assert torch.equal(y, expected)
    assert torch.autograd.grad(y.sum(), both)[0].dtype == torch.float64


@needs_library
def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x = made((2, 4, 3)).requires_grad_()
    y, _ = ghost_cpu.normalize(x, None, None, 2, EPS)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_without_the_library_pytorchs_operations_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = made((3, 4, 3))
    monkeypatch.setattr(ghost_cpu, "library", lambda: None)
    assert ghost_choice.choose(x, 3) is ghost_reference.normalize
    assert GhostBatchNorm1d(3, 4)(x).shape == x.shape


@needs_library
def test_the_library_is_used_if_it_is_there() -> None:
    assert ghost_choice.choose(made((3, 4, 3)), 3) is ghost_cpu.normalize
    with ghost_choice.by_pytorch_only():
        assert ghost_choice.choose(made((3, 4, 3)), 3) is ghost_reference.normalize


def test_a_library_that_cannot_be_loaded_is_replaced_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"of another machine")
    monkeypatch.setattr(ghost_cpu, "find_spec", lambda _: ModuleSpec("_ghost_cpu", None, origin=str(broken)))
    with pytest.warns(UserWarning, match=r"use PyTorch's operations, which are slower: .*broken\.so"):
        assert ghost_cpu.library.__wrapped__() is None
    stale = ModuleSpec("_ghost_cpu", None, origin=_ctypes.__file__)  # a library without the functions
    monkeypatch.setattr(ghost_cpu, "find_spec", lambda _: stale)
    with pytest.warns(UserWarning, match=r"slower: .*ghost_normalize; to rebuild the library: make setup"):
        assert ghost_cpu.library.__wrapped__() is None
    monkeypatch.setattr(ghost_cpu, "find_spec", lambda _: None)
    assert ghost_cpu.library.__wrapped__() is None


def test_a_build_without_a_compiler_succeeds(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, "CC": str(tmp_path / "no-compiler")}
    done = subprocess.run(  # noqa: PLW1510  # its message is asserted
        [*command, "--build-temp", str(tmp_path / "temp")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 'building extension "hvd_batchgrow.nn.ghost._ghost_cpu" failed' in done.stderr + done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_parts_have_the_same_members_in_c_and_in_python() -> None:
    source = (ROOT / "hvd_batchgrow" / "nn" / "ghost" / "ghost_cpu.c").read_text(encoding="utf-8")
    body = source.partition("Must match ghost_cpu.py")[2]
    members = [
        name.strip()
        for line in body.partition("} Part;")[0].splitlines()
        if line.strip().startswith("int64_t")
        for name in line.strip().removeprefix("int64_t").partition(";")[0].split(",")
    ]
    assert members == [field[0] for field in ghost_cpu._Part._fields_]
    assert ctypes.sizeof(ghost_cpu._Part) == 8 * len(members)
