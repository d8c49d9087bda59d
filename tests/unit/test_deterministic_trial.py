"""A layer without a deterministic kernel is named before an exact run begins.

On a CPU `put_` raises the error that other operations raise on a GPU.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_batchgrow.cli import main
from hvd_batchgrow.nn.build import build_model, check_deterministic
from hvd_batchgrow.nn.checks.deterministic_trial import any_kernels, nondeterministic_layer
from hvd_batchgrow.nn.ghost.convert import convert_ghost_batch_norm
from tests.helpers import small_job

EXAMPLE = torch.arange(4 * 6.0).view(4, 6).sin()


@pytest.fixture(autouse=True)
def _require() -> Iterator[None]:
    """Require deterministic algorithms within each test, as exact mode does."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def put(x: Tensor) -> Tensor:
    return x.detach().clone().put_(torch.tensor([0]), torch.zeros(1))


class PutInForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        put(x)
        return x


class OnlyInEvaluation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            put(x)
        return x


class _PutInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        put(gradient)
        return gradient


class PutInBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _PutInBackward.apply(x) * 2  # type: ignore[no-any-return, no-untyped-call]


class Between(nn.Module):
    """Its own operation is between two layers, each of which has autograd nodes too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(_PutInBackward.apply(self.first(x)))  # type: ignore[no-any-return, no-untyped-call]


class Repeated(nn.Module):
    """Repeats the forward of a layer in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)  # type: ignore[no-any-return]


class WithKeyword(nn.Module):
    """Passes a tensor that its own operation made to a layer, by keyword and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Named()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(values={"x": _PutInBackward.apply(x.requires_grad_())})  # type: ignore[no-any-return, no-untyped-call]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, values: dict[str, Tensor]) -> Tensor:
        return self.linear(values["x"])  # type: ignore[no-any-return]


def body(layer: nn.Module) -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Sequential(nn.ReLU(), layer), nn.Linear(6, 3))
    return convert_ghost_batch_norm(network, 2)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (body(PutInForward()), "2.1 (PutInForward): put_, in the forward pass"),
        (body(PutInBackward()), "2.1 (PutInBackward): put_, in the backward pass"),
        (body(OnlyInEvaluation()), "2.1 (OnlyInEvaluation): put_, in evaluation"),
        (Between(), "the network's own forward (Between): put_, in the backward pass"),
        (body(Repeated(PutInBackward())), "2.1.layer (PutInBackward): put_, in the backward pass"),
        (WithKeyword(), "the network's own forward (WithKeyword): put_, in the backward pass"),
        (body(nn.Identity()), None),
    ],
)
def test_the_layer_and_the_operation_are_named(network: nn.Module, expected: str | None) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    assert nondeterministic_layer(network, EXAMPLE) == expected
    for name, value in before.items():
        assert torch.equal(network.state_dict()[name], value)
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in network.parameters())


def test_other_errors_of_a_network_are_not_taken_for_it() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        nondeterministic_layer(Failing(6, 3), EXAMPLE)


@pytest.mark.parametrize("name", ["resnet20", "wrn_10_1", "alexnet", "vgg11_bn"])
def test_built_in_networks_pass_in_exact_mode_on_a_cpu(name: str) -> None:
    job = small_job(model={"name": name, "channels": None}, layout={"exact": True, "max_micro_batch": 8})
    check_deterministic(job, build_model(job, (32, 32, 3), 10), (32, 32, 3))


def test_kernels_are_free_while_a_network_is_built() -> None:
    with any_kernels():
        put(EXAMPLE)
    with pytest.raises(RuntimeError, match="put_"):
        put(EXAMPLE)


def test_a_mode_that_only_warns_is_restored_after_a_network_is_built() -> None:
    torch.set_deterministic_debug_mode("warn")
    with any_kernels():
        pass
    assert torch.get_deterministic_debug_mode() == 1


NETWORK = """
import torch
class Bad(torch.nn.Module):
    def forward(self, x):
        x.detach().clone().put_(torch.tensor([0]), torch.zeros(1))
        return x
def net(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), Bad(), torch.nn.Linear(64, num_classes))
"""


@pytest.mark.filterwarnings("ignore:put_ does not have a deterministic implementation")
@pytest.mark.parametrize(("exact", "threads"), [(True, 1), (True, 2), (False, 2)])
def test_an_exact_run_with_several_threads_is_refused_before_its_first_update(
    job: str, capsys: pytest.CaptureFixture[str], exact: bool, threads: int
) -> None:
    """With one thread, every kernel of a CPU is deterministic; fast mode takes any kernel."""
    required = exact and threads > 1
    Path("unordered.py").write_text(NETWORK)
    tree = tomllib.loads(Path(job).read_text())
    tree["model"] = {"name": "unordered:net", "ghost_batch": 8}
    Path("unordered.toml").write_text(tomli_w.dumps(tree))
    words = ["--layout.exact", str(exact).lower(), "--layout.max-micro-batch", "8"]
    words += ["--layout.threads-per-rank", str(threads)]
    before = torch.get_num_threads()
    try:
        assert main(["train", "unordered.toml", *words, "--max-updates", "1"]) == (2 if required else 75)
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    message = (
        "layout.exact: unordered:net has no deterministic kernel on cpu at 1 (Bad): put_, in the forward pass; "
        "use another layer, layout.exact = false, or layout.threads_per_rank = 1"
    )
    assert (message in capsys.readouterr().err) == required
    assert Path("runs/small").exists() != required
