"""Optimizers on an emulated accelerator: fused kernels, and states that cross to the CPU and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.config.optim import AdamSection, LarsSection, SgdSection
from hvd_batchgrow.optim.build import build_optimizer
from tests.emulated.device import launches
from tests.helpers import small_job

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "sgd without momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.0},
    "nesterov": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adam": {"name": "adam", "lr": 0.01, "weight_decay": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.01},
    "lars": {"name": "lars", "lr": 0.5, "momentum": 0.9, "weight_decay": 0.01},
}
LAUNCHES = {"sgd": 2, "sgd without momentum": 2, "nesterov": 2, "adam": 4, "adamw": 4, "lars": 22}
"""Two groups each; Adam also counts the steps of a group."""
SHAPES = ((4, 3, 2, 2), (5, 4), (6,), (3, 2, 1, 1), (7,))


class Weights(nn.Module):
    """Some parameters, the first in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        tensors = [torch.randn(shape, generator=draw) for shape in SHAPES]
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        self.all = nn.ParameterList(tensors)


class Training:
    """An optimizer that steps by gradients of the update alone; the last weight has no gradient in the first update."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.model = Weights().to(device)
        section = small_job(optim=OPTIMIZERS[name]).optim
        assert isinstance(section, SgdSection | AdamSection | LarsSection)
        self.optimizer = build_optimizer(self.model, section)

    def step(self, update: int) -> None:
        self.set_gradients(update)
        self.optimizer.step()

    def set_gradients(self, update: int) -> None:
        draw = torch.Generator().manual_seed(100 + update)
        for k, parameter in enumerate(self.model.parameters()):
            gradient = torch.randn(parameter.shape, generator=draw)
            if update or k < len(SHAPES) - 1:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)

    def weights(self) -> list[Tensor]:
        return [parameter.detach().cpu() for parameter in self.model.parameters()]

    def continue_from(self, other: Training) -> None:
        self.model.load_state_dict({name: value.cpu() for name, value in other.model.state_dict().items()})
        state = copy.deepcopy(other.optimizer.state_dict())
        for values in state["state"].values():
            # As a checkpoint holds them; a run without channels_last has written it.
            values.update({k: v.cpu().contiguous() for k, v in values.items() if isinstance(v, Tensor)})
        self.optimizer.load_state_dict(state)


def assert_close(found: Training, expected: Training) -> None:
    for one, other in zip(found.weights(), expected.weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_cpu_in_few_launches(device: torch.device, name: str) -> None:
    on_cpu, on_device = Training(name, CPU), Training(name, device)
    for update in range(4):
        on_cpu.step(update)
        on_device.set_gradients(update)
        launches.clear()
        on_device.optimizer.step()
    assert launches.total() == LAUNCHES[name], launches
    assert_close(on_device, on_cpu)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_continues_on_the_other_device_by_its_own_implementation(device: torch.device, name: str) -> None:
    expected = Training(name, CPU)
    for update in range(6):
        expected.step(update)
    training = Training(name, device)
    for update, next_device in enumerate((device, device, CPU, CPU, device, device)):
        moved = Training(name, next_device)
        own = [{key: group.get(key) for key in ("foreach", "fused")} for group in moved.optimizer.param_groups]
        moved.continue_from(training)
        assert own == [{key: group.get(key) for key in ("foreach", "fused")} for group in moved.optimizer.param_groups]
        training = moved
        training.step(update)
    assert_close(training, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_has_the_options_of_the_cpu(device: torch.device, name: str) -> None:
    saved = [Training(name, place).optimizer.state_dict()["param_groups"] for place in (CPU, device)]
    assert saved[0] == saved[1]
    is_fused = [group.get("fused") for group in Training(name, device).optimizer.param_groups]
    assert is_fused == [None if name == "lars" else True] * 2


def test_a_state_of_another_number_of_groups_is_refused() -> None:
    training = Training("sgd", CPU)
    state = training.optimizer.state_dict()
    state["param_groups"].append(state["param_groups"][0])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        training.optimizer.load_state_dict(state)
