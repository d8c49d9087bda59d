"""Unsupported parameters, dense memory, and the type of inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.nn.parameters import (
    gradient_strides,
    input_type,
    is_dense,
    make_dense,
    network_inputs,
    parameter_faults,
)
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.weight_average import WeightAverage
from tests.helpers import small_job

BIG = torch.arange(120.0).reshape(10, 12)


class Holder(nn.Module):
    """A module with the given parameters and buffers."""

    def __init__(self, buffers: dict[str, Tensor] | None = None, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            trains = value.is_floating_point() or value.is_complex()
            self.register_parameter(name, nn.Parameter(value, requires_grad=trains))
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value)


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (BIG, True),
        (BIG.t(), True),
        (BIG[2:4], True),
        (BIG[:, :5], False),
        (BIG[::2], False),
        (BIG[:1, :5], True),
        (torch.zeros(1).expand(4), False),
        (torch.tensor(1.0), True),
        (torch.empty(0), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
    ],
)
def test_density_is_whether_the_entries_fill_one_piece_of_memory(tensor: Tensor, dense: bool) -> None:
    assert is_dense(tensor) == dense
    # Autograd lays out a gradient in the same way:
    if tensor.numel() and 0 not in tensor.stride():
        parameter = nn.Parameter(tensor.clone(memory_format=torch.preserve_format) if dense else tensor)
        (parameter * torch.ones_like(parameter)).sum().backward()
        assert parameter.grad is not None
        strides = zip(parameter.shape, gradient_strides(parameter), parameter.grad.stride(), strict=True)
        assert all(ours == theirs for size, ours, theirs in strides if size > 1)


@pytest.mark.parametrize(
    ("model", "faults"),
    [
        (Holder(a=BIG[:, :5], b=BIG[:, 5:]), []),
        (Holder(a=BIG[:5], b=BIG[5:], buffers={"view": BIG[:5]}), []),
        (Holder(a=torch.zeros(3), n=torch.arange(3)), []),
        (Holder(a=torch.zeros(1).expand(4)), [r"a \(4,\) keeps several entries at one address"]),
        (Holder(a=BIG.as_strided((3, 4), (2, 1))), [r"a \(3, 4\) keeps several entries at one address"]),
        (Holder(a=BIG[:5], b=BIG[4:]), ["a shares memory with b"]),
        (Holder(a=BIG[:, :5], b=BIG[:, 4:6]), ["a shares memory with b"]),
        (Holder(a=BIG[:, :5], buffers={"whole": BIG}), ["a shares memory with whole"]),
        (Holder(a=torch.zeros(3, dtype=torch.complex64)), ["a is complex64: complex parameters are not supported"]),
        (Holder(a=torch.eye(3).to_sparse()), [r"a is torch.sparse_coo; make it dense"]),
    ],
)
def test_parameters_that_cannot_be_updated_are_named(model: nn.Module, faults: list[str]) -> None:
    found = parameter_faults(model)
    assert len(found) == len(faults)
    for line, fault in zip(found, faults, strict=True):
        with pytest.raises(ValueError, match=f"^parameter {fault}"):
            raise ValueError(line)


def test_the_engine_refuses_them_too() -> None:
    model = Holder(a=torch.zeros(1).expand(4))
    with pytest.raises(ValueError, match=r"parameter a \(4,\) keeps several entries at one address"):
        UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), SingleRank())


def test_parameters_with_gaps_become_dense_and_keep_their_values() -> None:
    model = Holder(a=BIG[:, :5], b=BIG[:, 5:].t(), c=BIG.t())
    make_dense(model)
    assert all(is_dense(parameter) for parameter in model.parameters())
    for name, value in (("a", BIG[:, :5]), ("b", BIG[:, 5:].t()), ("c", BIG.t())):
        assert torch.equal(getattr(model, name), value)
    assert model.get_parameter("c").data_ptr() == BIG.data_ptr()  # was dense


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32, torch.float32], torch.float32),
        ([torch.float64, torch.float64], torch.float64),
        ([torch.bfloat16, torch.bfloat16], torch.bfloat16),
        ([torch.float64, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.int64, torch.float32], torch.float32),
        ([torch.int64, torch.float16], torch.float16),
    ],
)
def test_inputs_have_the_type_that_all_parameters_share_or_else_float32(
    dtypes: list[torch.dtype], expected: torch.dtype
) -> None:
    parameters: dict[str, Any] = {f"p{k}": torch.zeros(2, dtype=dtype) for k, dtype in enumerate(dtypes)}
    assert input_type(Holder(**parameters)) == expected


def test_inputs_follow_a_network_that_is_converted_later() -> None:
    network = nn.Linear(3, 2)
    assert network_inputs(torch.zeros(1, 3), network).dtype == torch.float32
    assert network_inputs(torch.zeros(1, 3), network.double()).dtype == torch.float64
    assert network_inputs(torch.zeros(1, 3), network.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_norms_and_biases_decay_if_the_job_says_so(name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    optim = small_job(optim={"name": name, "weight_decay": 0.5, "decay_norm_and_bias": True}).optim
    optimizer = build_optimizer(model, optim)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
    bias = model.get_parameter("0.bias")
    bias.data.fill_(2.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # SGD: w - ε β w; Adam takes a step of ε along the sign of β w; AdamW: w (1 - ε β); Lars: like SGD, without λ
    lr = optimizer.param_groups[0]["lr"]
    expected = {"sgd": 2 - lr * 1.0, "adam": 2 - lr, "adamw": 2 * (1 - lr * 0.5), "lars": 2 - lr * 1.0}[name]
    assert bias.tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_the_average_of_16_bit_weights_moves_by_less_than_their_spacing() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    average = WeightAverage(model, 1000.0)
    model.weight.data.fill_(1.0)
    average.update(1)
    model.weight.data.fill_(1.5)
    average.update(1)
    moved = average.state_dict()["weight"]
    expected = 1.5 - 0.5 * torch.tensor(-1e-3, dtype=torch.float64).exp()
    assert moved.item() == pytest.approx(expected.item(), rel=1e-6)  # bfloat16 would round this to 1


def make(kind: str, num_classes: int) -> nn.Module:
    """Return the network of the job below."""
    layers: dict[str, Callable[[], Any]] = {
        "expanded": lambda: nn.Parameter(torch.zeros(1).expand(16)),
        "complex": lambda: nn.Parameter(torch.zeros(16, dtype=torch.complex64)),
    }
    first = nn.Linear(6, 16)
    first.bias = layers[kind]()
    return nn.Sequential(first, nn.Linear(16, num_classes))


@pytest.mark.parametrize("kind", ["expanded", "complex"])
def test_a_network_that_cannot_be_trained_leaves_no_run_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(
        f"""name = "x"
        data = {{source = "synthetic_rows", num_samples = 64, shape = [6], num_classes = 4}}
        model = {{name = "tests.unit.test_parameters:make", ghost_batch = 16, kwargs = {{kind = "{kind}"}}}}
        optim = {{name = "sgd", lr = 0.1}}
        schedule = {{policy = "decay", epochs = 1, global_batch = 32}}
        """
    )
    assert main(["train", "job.toml"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "x: 1 fault"
    assert error[1].startswith("  model.name: tests.unit.test_parameters:make: parameter 0.bias ")
    assert len(error) == 2
    assert not Path("runs/x").exists()
