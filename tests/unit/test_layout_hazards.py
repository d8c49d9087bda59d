"""Networks whose results depend on how a batch is divided."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.nn.checks.layout_hazards import WHOLE, layout_hazards
from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from tests.helpers import job_tree


class CentersTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class PairsUp(nn.Module):
    """The network's own forward mixes each sample with its neighbor; its submodules do not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(0.7 * x + 0.3 * x.roll(1, 0))
        return out


def network(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), GhostBatchNorm1d(8, 16), *middle, nn.ReLU(), nn.Linear(8, 3))


def test_ghost_norms_and_keyed_dropout_are_not_hazards() -> None:
    assert layout_hazards(network(KeyedDropout(0.5)), (6,)) == []


@pytest.mark.parametrize("name", ["small_conv_net", "wrn_10_1", "resnet8", "alexnet"])
def test_our_networks_have_no_hazards(name: str) -> None:
    tree = job_tree(model={"name": name})
    if name != "small_conv_net":
        del tree["model"]["channels"]
    assert layout_hazards(build_model(parse_job(tree), (32, 32, 1), 3), (1, 32, 32)) == []


def test_the_module_that_mixes_samples_is_named() -> None:
    text = "2: samples of a batch affect each other outside of ghost norms"
    assert layout_hazards(network(CentersTheBatch()), (6,)) == [text]
    assert layout_hazards(network(nn.Sequential(nn.Tanh(), CentersTheBatch())), (6,))[0].startswith("2.1: samples")
    # A mix in the network's own forward shows first in the next submodule's output.
    assert layout_hazards(PairsUp(), (6,)) == ["linear: samples of a batch affect each other outside of ghost norms"]


class Computed(nn.Module):
    """Rows of 48 numbers, changed by a function, and a layer."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.before, self.after = nn.Linear(48, 8), before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


class Recurrent(nn.Module):
    """A recurrent layer built without batch_first, which takes the samples for the steps of a sequence."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0]
        return out


def as_it_is(x: Tensor) -> Tensor:
    return x


def mean_in_row(row: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[row] = x.mean(0)
        return changed

    return change


@pytest.mark.parametrize(
    ("make", "shape", "cause"),
    [
        (lambda: Recurrent(nn.GRU(48, 8)), (48,), "layer"),
        (lambda: Recurrent(nn.LSTM(48, 8)), (48,), "layer"),
        (lambda: Recurrent(nn.RNN(12, 8)), (4, 12), "layer"),
        (lambda: Computed(lambda x: x.cumsum(0), as_it_is), (48,), "layer"),
        (lambda: Computed(lambda x: x.flip(0).cumsum(0).flip(0), as_it_is), (48,), "layer"),
        (lambda: Computed(lambda x: x - x[:1], as_it_is), (48,), "layer"),
        (lambda: Computed(lambda x: x - x[-1:], as_it_is), (48,), "layer"),
        (lambda: Computed(as_it_is, lambda y: y / len(y)), (48,), WHOLE),
        (lambda: Computed(mean_in_row(0), as_it_is), (48,), "layer"),
        (lambda: Computed(mean_in_row(-1), as_it_is), (48,), "layer"),
        # Of the 7 samples, the one with the largest first number is the second, third or fourth.
        (lambda: Computed(lambda x: x * (1 + (x[:, :1] == x[:, :1].max()).float()), as_it_is), (48,), "layer"),
    ],
)
def test_mixing_is_found_in_whichever_rows_it_shows(
    make: Callable[[], nn.Module], shape: tuple[int, ...], cause: str
) -> None:
    """In every row but the first one, in only the first or the last one, in one chosen row, and as a factor of all."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, *shape)
    with torch.no_grad():
        alone = torch.cat([model(x[:2]), model(x[2:])])
        assert not torch.allclose(model(x), alone, atol=1e-3), "the micro-batch changes the outputs"
    assert layout_hazards(model, shape) == [f"{cause}: samples of a batch affect each other outside of ghost norms"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_not_a_hazard(dtype: torch.dtype) -> None:
    """The kernels for other numbers of samples may round in another way, here by 4 units in the last place."""

    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + len(x) % 2 * 4 * torch.finfo(dtype).eps)

    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)]
    assert layout_hazards(nn.Sequential(*layers, Rounds()).to(dtype), (6,)) == []
    assert layout_hazards(nn.Sequential(*layers, Rounds()).float(), (6,)) == [
        "3: samples of a batch affect each other outside of ghost norms"
    ]


def test_modules_that_draw_are_named_before_those_that_mix_samples() -> None:
    drawing = [nn.Dropout(0.1) for _ in range(5)]
    assert layout_hazards(network(*drawing, CentersTheBatch()), (6,)) == [
        "2, 3, 4 and 2 more: random numbers that are not keyed by sample"
    ]


def test_the_network_is_not_changed() -> None:
    model = network(CentersTheBatch()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    layout_hazards(model, (6,))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


class Experts(nn.Module):
    """Each sample goes to one of two layers, so the layers get varying numbers of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        out, chosen = x.new_zeros(len(x), 3), (x[:, 0] > 0).long()
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            if len(rows):
                out[rows] = expert(x[rows])
        return out


class Packed(nn.Module):
    """A recurrent layer that sorts the samples by length; its state has 4 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, 3, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, 0] > 0).long() + 2
        steps = nn.utils.rnn.pack_padded_sequence(x.view(-1, 3, 2), lengths, batch_first=True, enforce_sorted=False)
        state: Tensor = self.layer(steps)[1][0]
        return state[-1]


class InPlace(nn.Module):
    """A network that overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.mul_(0.5).add_(1))
        return out


class Branches(nn.Module):
    """Layers that return in any order, like layers in threads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.calls = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        order = [0, 1] if self.calls % 2 else [1, 0]
        found = {index: self.layers[index](x) for index in order}
        out: Tensor = found[0] + found[1]
        return out


@pytest.mark.parametrize("make", [Experts, Packed, InPlace, Branches])
def test_modules_that_only_seem_to_mix_samples_are_not_hazards(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert layout_hazards(make(), (6,)) == []


def test_an_expert_that_mixes_samples_is_found_at_the_output() -> None:
    class Meeting(Experts):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x[:, :3].mean(0)

    assert layout_hazards(Meeting(), (6,)) == [
        "the network's own forward: samples of a batch affect each other outside of ghost norms"
    ]
