"""Ghost norms on a GPU: the modules with the kernels that they choose, at sizes that fill the GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.ghost import ghost_choice, ghost_reference
from hvd_batchgrow.nn.ghost.convert import convert_ghost_batch_norm
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d
from hvd_batchgrow.nn.ghost.ghost_choice import by_pytorch_only

GHOST = 32
SHAPES = [
    (256, 64, 32, 32),
    (256, 64, 8, 8),
    (64, 512, 7, 7),
    (64, 3, 15, 15),
    (128, 64, 56, 56),
    (256, 100),
    (64, 9, 33),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_layout = pytest.mark.parametrize("channels_last", [False, True])


def make(shape: tuple[int, ...], device: torch.device) -> GhostBatchNorm:
    torch.manual_seed(1)
    norm = (GhostBatchNorm2d if len(shape) == 4 else GhostBatchNorm1d)(shape[1], GHOST)
    for parameter, (low, high) in zip(norm.parameters(), ((0.5, 2), (-1, 1)), strict=True):
        nn.init.uniform_(parameter, low, high)
    return norm.to(device)


def drawn(shape: tuple[int, ...], device: torch.device, channels_last: bool, seed: int = 2) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    return (x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x).to(device)


def forward_and_backward(norm: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *norm.parameters()], upstream.to(y.dtype))]


def assert_is_batch_norm_on_each_ghost_batch(shape: tuple[int, ...], device: torch.device, channels_last: bool) -> None:
    norm = make(shape, device)
    plain = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1]).to(device)
    plain.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    x, upstream = (drawn(shape, device, channels_last, seed) for seed in (2, 3))
    y, of_x, *of_parameters = forward_and_backward(norm, x, upstream)
    chunks = [forward_and_backward(plain, *pair) for pair in zip(x.split(GHOST), upstream.split(GHOST), strict=True)]
    torch.testing.assert_close(y, torch.cat([chunk[0] for chunk in chunks]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_x, torch.cat([chunk[1] for chunk in chunks]), rtol=1e-4, atol=1e-4)
    # Each is a sum of one product of order 3 per value of the channel; such sums grow like a random walk.
    atol = 1e-5 * 3 * (x.numel() / shape[1]) ** 0.5 + 1e-4
    for k, value in enumerate(of_parameters):
        torch.testing.assert_close(value, sum(chunk[2 + k] for chunk in chunks), rtol=1e-4, atol=atol)
    torch.testing.assert_close(list(norm.buffers()), list(plain.buffers())[:2], rtol=1e-4, atol=1e-4)
    assert y.stride() == of_x.stride() == x.stride()


@each_shape
@each_layout
def test_it_is_batch_norm_on_each_ghost_batch(shape: tuple[int, ...], gpu: torch.device, channels_last: bool) -> None:
    assert_is_batch_norm_on_each_ghost_batch(shape, gpu, channels_last)


@each_shape
@each_layout
def test_pytorchs_operations_are_batch_norm_on_each_ghost_batch_too(
    shape: tuple[int, ...], gpu: torch.device, channels_last: bool
) -> None:
    with by_pytorch_only():
        assert_is_batch_norm_on_each_ghost_batch(shape, gpu, channels_last)


@each_shape
@each_layout
def test_runs_are_bit_identical(shape: tuple[int, ...], gpu: torch.device, channels_last: bool) -> None:
    x, upstream = (drawn(shape, gpu, channels_last, seed) for seed in (2, 3))
    first = forward_and_backward(make(shape, gpu), x, upstream)
    for _ in range(3):
        assert all(map(torch.equal, forward_and_backward(make(shape, gpu), x, upstream), first))


@each_shape
def test_a_ghost_batch_does_not_depend_on_the_others(shape: tuple[int, ...], gpu: torch.device) -> None:
    x, upstream = (drawn(shape, gpu, channels_last=False, seed=seed) for seed in (2, 3))
    norm = make(shape, gpu)
    whole = forward_and_backward(norm, x, upstream)
    if find_spec("triton") is not None:
        alone = forward_and_backward(norm, x[:GHOST], upstream[:GHOST])
        assert all(torch.equal(a[:GHOST], b) for a, b in zip(whole[:2], alone[:2], strict=True))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_is_used_for_inputs_that_it_supports(gpu: torch.device) -> None:
    from hvd_batchgrow.nn.ghost import ghost_triton

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert ghost_choice.choose(torch.zeros(4, 2, device=gpu, dtype=dtype), 2) is ghost_triton.normalize
    assert ghost_choice.choose(torch.zeros(4, 2, device=gpu, dtype=torch.float64), 2) is ghost_reference.normalize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_layout
def test_under_autocast_results_are_those_of_pytorch(
    gpu: torch.device, dtype: torch.dtype, channels_last: bool
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), GhostBatchNorm2d(16, GHOST, relu=True), nn.Conv2d(16, 4, 1)
    )
    network.to(gpu)
    x = drawn((64, 3, 12, 12), gpu, channels_last)

    def run() -> list[Tensor]:
        with torch.autocast("cuda", dtype):
            y = network(x)
        assert y.dtype == dtype
        return [y, *torch.autograd.grad(y.float().square().mean(), list(network.parameters()))]

    got = run()
    with by_pytorch_only():
        plain = run()
    for value, expected in zip(got, plain, strict=True):
        # Each is a sum of some hundred values; rounding changes a few of them by one unit in the last place.
        scale = expected.float().abs().max().item()
        torch.testing.assert_close(value.float(), expected.float(), rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_a_compiled_network_gives_the_same(gpu: torch.device) -> None:
    network, x = nn.Sequential(make((64, 3, 15, 15), gpu), nn.Sigmoid()), drawn((64, 3, 15, 15), gpu, False)
    y = torch.compile(network, backend="eager")(x.requires_grad_())
    expected = network(x)
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(each.sum(), x)[0] for each in (y, expected)))


@pytest.mark.usefixtures("float32_convolutions")
def test_a_converted_network_trains_as_on_a_cpu(gpu: torch.device) -> None:
    def run(device: torch.device) -> list[Tensor]:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 6))
        network = nn.Sequential(body, nn.BatchNorm1d(6))
        convert_ghost_batch_norm(network, 4).to(device)
        images = drawn((12, 3, 12, 12), device, channels_last=False)
        y = network(images)
        of = torch.autograd.grad(y, list(network.parameters()), drawn((12, 6), device, channels_last=False))
        return [tensor.cpu() for tensor in (y, *of, *network.eval()(images), *network.buffers())]

    torch.testing.assert_close(run(gpu), run(torch.device("cpu")), rtol=1e-3, atol=1e-3)
