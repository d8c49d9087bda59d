"""Number types, alone and mixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.zoo.entry import FEATURES, Around, dense_net, network


def _scaled(num_classes: int, dtype: torch.dtype) -> nn.Module:
    """The first parameter has another type than the others."""
    scale = nn.Parameter(torch.full((FEATURES,), 1.25, dtype=dtype))
    return Around(lambda net, x: net.net(x * net.scale.to(x.dtype)), scale=scale, net=dense_net(num_classes))


@network()
def float64_first(num_classes: int) -> nn.Module:
    return _scaled(num_classes, torch.float64)


@network()
def bfloat16_first(num_classes: int) -> nn.Module:
    return _scaled(num_classes, torch.bfloat16)


@network()
def float16_first(num_classes: int) -> nn.Module:
    return _scaled(num_classes, torch.float16)


@network()
def integers_first(num_classes: int) -> nn.Module:
    order = nn.Parameter(torch.randperm(FEATURES), requires_grad=False)
    return Around(lambda net, x: net.net(x[:, net.order]), order=order, net=dense_net(num_classes))


@network()
def booleans_first(num_classes: int) -> nn.Module:
    mask = nn.Parameter(torch.arange(FEATURES) % 3 > 0, requires_grad=False)
    return Around(lambda net, x: net.net(x * net.mask), mask=mask, net=dense_net(num_classes))


def _in_the_middle(num_classes: int, dtype: torch.dtype) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        return net.last(net.middle(net.first(x).to(dtype)).tanh().float())

    middle = nn.Linear(8, 8).to(dtype)
    return Around(forward, first=nn.Linear(FEATURES, 8), middle=middle, last=nn.Linear(8, num_classes))


@network()
def float64_in_the_middle(num_classes: int) -> nn.Module:
    return _in_the_middle(num_classes, torch.float64)


@network()
def bfloat16_in_the_middle(num_classes: int) -> nn.Module:
    return _in_the_middle(num_classes, torch.bfloat16)


@network()
def float64_everywhere(num_classes: int) -> nn.Module:
    """A network that casts its inputs itself."""
    return Around(lambda net, x: net.net(x.double()), net=dense_net(num_classes).double())


@network(inputs=torch.float64)
def float64_without_a_cast(num_classes: int) -> nn.Module:
    """Inputs have the type of the parameters, if all have the same type."""
    return dense_net(num_classes).double()


@network()
def bfloat16_everywhere(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x.bfloat16()), net=dense_net(num_classes).bfloat16())


@network(inputs=torch.bfloat16)
def bfloat16_without_a_cast(num_classes: int) -> nn.Module:
    return dense_net(num_classes).bfloat16()


@network(coarse=torch.bfloat16)
def autocast_inside(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return net.net(x).float()

    return Around(forward, net=dense_net(num_classes))


@network()
def fake_quantized(num_classes: int) -> nn.Module:
    """Round the weights in the forward, and pass gradients through (straight-through estimator)."""

    def forward(net: Any, x: Tensor) -> Any:
        weight = net.first.weight
        rounded = weight + ((weight * 64).round() / 64 - weight).detach()
        return net.last(nn.functional.linear(x, rounded, net.first.bias).tanh())

    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(8, num_classes))


@network(refused="complex")
def complex_filter(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        return net.last(torch.fft.irfft(torch.fft.rfft(net.first(x)) * net.filter, n=8).tanh())

    weight = nn.Parameter(torch.randn(5, dtype=torch.cfloat))
    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(8, num_classes), filter=weight)


@network(refused="complex")
def complex_first(num_classes: int) -> nn.Module:
    weight = nn.Parameter(torch.randn(FEATURES, dtype=torch.cfloat))
    return Around(lambda net, x: net.net((x * net.filter).abs()), filter=weight, net=dense_net(num_classes))


@network()
def complex_by_pairs(num_classes: int) -> nn.Module:
    """A real parameter that the forward uses as a complex one."""

    def forward(net: Any, x: Tensor) -> Any:
        return net.last((torch.fft.rfft(net.first(x)) * torch.view_as_complex(net.filter)).abs())

    weight = nn.Parameter(torch.randn(5, 2))
    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(5, num_classes), filter=weight)


@network()
def complex_buffer(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        return net.last((torch.fft.rfft(net.first(x)) * net.filter).abs())

    weight = torch.randn(5, dtype=torch.cfloat)
    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(5, num_classes), filter=weight)


@network(refused="complex|quantized|Quantized|float8|type")
def float8_parameter(num_classes: int) -> nn.Module:
    return _scaled(num_classes, torch.float8_e4m3fn)
