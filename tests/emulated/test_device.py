"""The emulated accelerator itself: what is an error, what makes the host wait, and what is one launch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.emulated.device import Event, MixedDevicesError, launches, waits


def test_an_operation_on_both_devices_is_an_error(device: torch.device) -> None:
    with pytest.raises(MixedDevicesError, match=r"emulated:0 and a CPU tensor of shape \(2, 3\)"):
        torch.zeros(2, 3, device=device) + torch.zeros(2, 3)
    assert (torch.ones(2, device=device) * torch.tensor(2.0)).tolist() == [2.0, 2.0]


def test_what_makes_the_host_wait_is_counted(device: torch.device) -> None:
    host = torch.arange(3.0)
    waits.clear()
    values = host.pin_memory().to(device, non_blocking=True)
    nn.functional.relu(values).sum()
    assert not waits
    for reads in (
        lambda: values.sum().item(),
        values.tolist,
        values.cpu,
        lambda: bool(values.any()),
        lambda: values[values > 0],
        lambda: host.to(device),
        lambda: host.to(device, non_blocking=True),
    ):
        waits.clear()
        reads()
        assert waits.total() == 1


def test_an_operation_on_lists_is_one_launch_if_their_tensors_are_alike(device: torch.device) -> None:
    def launched(*others: Tensor) -> int:
        tensors = [torch.zeros(2, 3, 4, 5, device=device), torch.zeros(6, device=device)]
        launches.clear()
        torch._foreach_add_(tensors, list(others))
        return launches.total()

    image, row = torch.zeros(2, 3, 4, 5).to(device), torch.zeros(6).to(device)
    number = torch.zeros(()).to(device)
    assert launched(image, row) == 1
    assert launched(number, number) == 2
    assert launched(image.to(memory_format=torch.channels_last), row) == 2
    assert launched(image.double(), row) == 2
    assert launched(image, number.expand(6)) == 2


def test_a_fused_optimizer_requires_states_that_are_laid_out_as_their_parameters(device: torch.device) -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, 5, device=device))
    parameter.grad = torch.ones_like(parameter).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="_fused_sgd_: params, grads and states must have the same type"):
        torch.optim.SGD([parameter], lr=0.1, fused=True).step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_inputs_of_products_and_leaves_gradients_in_float32(
    device: torch.device, dtype: torch.dtype
) -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).to(device)
    images = torch.rand(4, 2, 4, 4).to(device)
    with torch.autocast(device.type, dtype):
        output = network(images)
        norm = nn.functional.layer_norm(images, (4,))
    assert (output.dtype, norm.dtype) == (dtype, torch.float32)
    assert network(images).dtype == torch.float32
    output.float().sum().backward()
    assert {parameter.grad.dtype for parameter in network.parameters() if parameter.grad is not None} == {torch.float32}


def test_the_time_to_an_event_is_known_after_a_wait(device: torch.device) -> None:
    events = [Event(enable_timing=True) for _ in range(2)]
    for event in events:
        event.record(None)
    with pytest.raises(RuntimeError, match="not ready"):
        events[0].elapsed_time(events[1])
    torch.ones(1, device=device).item()
    assert events[0].elapsed_time(events[1]) >= 0
