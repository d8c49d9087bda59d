"""Networks that change in a forward, draw random numbers, or keep state other than tensors."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.fuzz.zoo.entry import FEATURES, Around, dense_net, network

CHANGED = "changes buffers in training"
MEET = "samples of a batch affect each other"


@network(named=CHANGED, order="first")
def spectral_norm(num_classes: int) -> nn.Module:
    norm = parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(FEATURES, 10)), nn.Tanh(), norm(nn.Linear(10, num_classes)))


def _moving_average(net: Any, x: Tensor) -> Any:
    """Subtract the moving mean of earlier inputs, and update it in training."""
    output = net.net(x - net.mean.clone())
    if net.training:
        net.mean.lerp_(x.detach().mean(0), 0.3)
    return output


@network(named=CHANGED, order="first")
def moving_average_of_inputs(num_classes: int) -> nn.Module:
    return Around(_moving_average, net=dense_net(num_classes), mean=torch.zeros(FEATURES))


@network(named=CHANGED, order="first")
def moving_average_that_is_not_saved(num_classes: int) -> nn.Module:
    net = Around(_moving_average, net=dense_net(num_classes))
    net.register_buffer("mean", torch.zeros(FEATURES), persistent=False)
    return net


@network(named=CHANGED, exact_refused=MEET, order="first")
def largest_seen(num_classes: int) -> nn.Module:
    """An observer, as in quantization."""

    def forward(net: Any, x: Tensor) -> Any:
        if net.training:
            net.largest.copy_(torch.maximum(net.largest, x.detach().abs().max()))
        return net.net(x / net.largest)

    return Around(forward, net=dense_net(num_classes), largest=torch.ones(()))


@network(named=CHANGED, exact_refused=MEET, order="first")
def codebook(num_classes: int) -> nn.Module:
    """Vector quantization: each code is a moving average of the vectors assigned to it."""

    def forward(net: Any, x: Tensor) -> Any:
        code = net.first(x)
        index = torch.cdist(code, net.codes).argmin(1)
        if net.training:
            chosen = functional.one_hot(index, len(net.codes)).float()
            mean = chosen.t() @ code.detach() / chosen.sum(0).clamp_min(1)[:, None]
            used = chosen.sum(0)[:, None] > 0
            net.codes.copy_(torch.where(used, net.codes.lerp(mean, 0.2), net.codes))
        return net.last(code + (net.codes[index] - code).detach())

    return Around(forward, first=nn.Linear(FEATURES, 6), last=nn.Linear(6, num_classes), codes=torch.randn(5, 6))


def _act_norm(num_classes: int, shift: Tensor) -> nn.Module:
    """Return a network whose first batch in training sets a shift."""

    def forward(net: Any, x: Tensor) -> Any:
        code = net.first(x)
        if net.training and not net.done:
            with torch.no_grad():
                net.shift.copy_(code.mean(0))
                net.done.fill_(True)
        return net.last((code - net.shift).tanh())

    first, last = nn.Linear(FEATURES, 6), nn.Linear(6, num_classes)
    return Around(forward, first=first, last=last, shift=shift, done=torch.tensor(False))


@network(named=CHANGED, exact_refused=MEET, order="first")
def initialized_by_the_data(num_classes: int) -> nn.Module:
    return _act_norm(num_classes, torch.zeros(6))


@network(refused="changes the parameters shift")
def parameters_initialized_by_the_data(num_classes: int) -> nn.Module:
    return _act_norm(num_classes, nn.Parameter(torch.zeros(6)))


@network(named=CHANGED, order="first")
def counts_its_forwards(num_classes: int) -> nn.Module:
    """An integer buffer that scales the output."""

    def forward(net: Any, x: Tensor) -> Any:
        if net.training:
            net.calls += 1
        return net.net(x) / (1 + net.calls)

    return Around(forward, net=dense_net(num_classes), calls=torch.tensor(0))


@network(named=CHANGED, exact_refused=MEET, order="first")
def replaces_its_buffer(num_classes: int) -> nn.Module:
    """The forward assigns a new tensor to the buffer."""

    def forward(net: Any, x: Tensor) -> Any:
        if net.training:
            net.mean = 0.7 * net.mean + 0.3 * x.detach().mean(0)
        return net.net(x - net.mean)

    return Around(forward, net=dense_net(num_classes), mean=torch.zeros(FEATURES))


@network(refused="changes the shape of buffer memory")
def buffer_that_grows(num_classes: int) -> nn.Module:
    """A buffer to which each forward in training adds a row."""

    def forward(net: Any, x: Tensor) -> Any:
        if net.training:
            net.memory = torch.cat([net.memory, x.detach()[:1]])
        return net.net(x + net.memory.mean(0))

    return Around(forward, net=dense_net(num_classes), memory=torch.zeros(1, FEATURES))


@network()
def buffer_that_is_not_saved(num_classes: int) -> nn.Module:
    net = Around(lambda net, x: net.net(x + net.place), net=dense_net(num_classes))
    net.register_buffer("place", torch.linspace(-1, 1, FEATURES), persistent=False)
    return net


@network(exact_refused="attributes that are not buffers", compared=False)
def counts_in_an_attribute(num_classes: int) -> nn.Module:
    """State outside the buffers, which checkpoints do not contain. Fast mode must at least not fail."""

    def forward(net: Any, x: Tensor) -> Any:
        net.calls += net.training
        return net.net(x) / (1 + 0.1 * net.calls)

    return Around(forward, net=dense_net(num_classes), calls=0)


# --- extra state -----------------------------------------------------------------------------------


class Extra(nn.Module):
    """A network with any value as extra state."""

    def __init__(self, num_classes: int, state: Any) -> None:
        super().__init__()
        self.net, self.note = dense_net(num_classes), state

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


@network()
def extra_state_dict(num_classes: int) -> nn.Module:
    return Extra(num_classes, {"calls": 3, "name": "x", "parts": [1, 2.5, None, True]})


@network()
def extra_state_tensor(num_classes: int) -> nn.Module:
    return Extra(num_classes, torch.arange(5.0))


@network()
def extra_state_tensors_inside(num_classes: int) -> nn.Module:
    return Extra(num_classes, {"mean": torch.zeros(3), "seen": (torch.ones(2), 7)})


@network()
def extra_state_none(num_classes: int) -> nn.Module:
    return Extra(num_classes, None)


@network(refused="extra state|state_dict|saved|checkpoint")
def extra_state_object(num_classes: int) -> nn.Module:
    """Extra state that only pickle could save."""
    return Extra(num_classes, Around(lambda net, x: x))


@network()
def holds_what_cannot_be_copied(num_classes: int) -> nn.Module:
    parts = {"net": dense_net(num_classes), "lock": threading.Lock(), "function": lambda x: x}
    return Around(lambda net, x: net.net(x), **parts)


# --- random numbers --------------------------------------------------------------------------------


def _random(num_classes: int, layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), layer, nn.Linear(12, num_classes))


@network()
def dropout_0(num_classes: int) -> nn.Module:
    return _random(num_classes, nn.Dropout(0.0))


@network(compared=False)
def dropout(num_classes: int) -> nn.Module:
    return _random(num_classes, nn.Dropout(0.3))


@network()
def dropout_1(num_classes: int) -> nn.Module:
    return _random(num_classes, nn.Dropout(1.0))


@network(compared=False)
def dropout_of_channels(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (3, 36)), nn.Dropout1d(0.3), nn.Flatten(), nn.Linear(FEATURES, num_classes))


@network(exact_refused="random numbers", compared=False)
def alpha_dropout(num_classes: int) -> nn.Module:
    return _random(num_classes, nn.AlphaDropout(0.3))


@network(exact_refused="random numbers", compared=False)
def randomized_relu(num_classes: int) -> nn.Module:
    return _random(num_classes, nn.RReLU())


@network(exact_refused="random numbers", compared=False)
def functional_dropout(num_classes: int) -> nn.Module:
    return Around(
        lambda net, x: net.last(functional.dropout(net.first(x), 0.3, net.training)),
        first=nn.Linear(FEATURES, 8),
        last=nn.Linear(8, num_classes),
    )


@network(exact_refused="random numbers", compared=False)
def noise_on_weights(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        weight = net.first.weight
        noise = 0.1 * torch.randn_like(weight) if net.training else 0
        return net.last(functional.linear(x, weight + noise).tanh())

    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(8, num_classes))


class Depth(nn.Module):
    """Stochastic depth: a layer that some forwards skip."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.training and float(torch.rand(())) < 0.5
        return x if skipped else x + self.layer(x).tanh()


@network(exact_refused="random numbers", compared=False)
def stochastic_depth(num_classes: int) -> nn.Module:
    return _random(num_classes, Depth())
