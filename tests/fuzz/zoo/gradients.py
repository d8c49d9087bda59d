"""Networks that change their backward pass: by hooks, autograd functions, or by writing gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.zoo.entry import FEATURES, Around, dense_net, linear, network


@network()
def hook_on_a_parameter(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    linear(net, 0).weight.register_hook(lambda gradient: gradient * 0.5)
    return net


@network(refused="not proportional to the loss")
def hook_that_clips(num_classes: int) -> nn.Module:
    """The hook gets the gradient of a sum over a micro-batch here, and of a mean over the batch in a plain loop."""
    net = dense_net(num_classes)
    linear(net, 2).bias.register_hook(lambda gradient: gradient.clamp(-0.5, 0.5))
    return net


class Backward(torch.autograd.Function):
    """The identity, with a function of the gradient as its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.function(gradient), None


with_backward: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] = Backward.apply


@network(refused="not proportional to the loss")
def function_that_clips(num_classes: int) -> nn.Module:
    return Around(
        lambda net, x: net.last(with_backward(net.first(x), lambda gradient: gradient.clamp(-0.01, 0.01))),
        first=nn.Linear(FEATURES, 8),
        last=nn.Linear(8, num_classes),
    )


@network(refused="not proportional to the loss")
def constant_gradient(num_classes: int) -> nn.Module:
    """A regularizer that a hook adds to the gradient, once per micro-batch."""
    net = dense_net(num_classes)
    linear(net, 0).weight.register_hook(lambda gradient: gradient + 0.01 * linear(net, 0).weight.detach().sign())
    return net


@network()
def hook_on_an_activation(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        x = net.first(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 3)
        return net.last(x)

    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(8, num_classes))


@network()
def full_backward_hook(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)

    def double(module: nn.Module, inputs: Any, outputs: Any) -> tuple[Tensor]:
        return (inputs[0] * 2,)

    net[1].register_full_backward_hook(double)
    return net


@network()
def forward_hooks(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    net[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    net[0].register_forward_hook(lambda module, inputs, output: output - 0.1)
    return net


@network(refused="add up")
def hook_after_accumulation(num_classes: int) -> nn.Module:
    """The hook changes the sum of the earlier micro-batches, which depends on the layout."""
    net = dense_net(num_classes)

    def halve(weight: Any) -> None:
        weight.grad.mul_(0.5)

    linear(net, 0).weight.register_post_accumulate_grad_hook(halve)
    return net


@network(refused="changes the parameters|add up")
def hook_that_takes_the_gradient_away(num_classes: int) -> nn.Module:
    """Like optimizers that step in the backward pass."""
    net = dense_net(num_classes)

    def step(weight: Any) -> None:
        weight.data.sub_(weight.grad, alpha=0.01)
        weight.grad = None

    linear(net, 0).weight.register_post_accumulate_grad_hook(step)
    return net


@network()
def gradient_reversal(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        x = net.first(x).tanh()
        return net.last(x) + net.other(with_backward(x, lambda gradient: -gradient))

    return Around(
        forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(8, num_classes), other=nn.Linear(8, num_classes)
    )


@network()
def detached_branch(num_classes: int) -> nn.Module:
    return Around(
        lambda net, x: net.last(net.first(x).tanh()) + net.other(net.first(x).detach()),
        first=nn.Linear(FEATURES, 8),
        last=nn.Linear(8, num_classes),
        other=nn.Linear(8, num_classes),
    )


@network()
def without_gradient_in_part(num_classes: int) -> nn.Module:
    """The first layer runs in no_grad, although its parameters require gradients: torch never trains them."""

    def forward(net: Any, x: Tensor) -> Any:
        with torch.no_grad():
            x = net.first(x)
        return net.last(x.tanh())

    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(8, num_classes))


@network(refused="grad")
def without_gradient(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x).detach(), net=dense_net(num_classes))


@network(refused="grad|inference")
def in_inference_mode(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        with torch.inference_mode():
            return net.net(x)

    return Around(forward, net=dense_net(num_classes))


def _raise(gradient: Tensor) -> Tensor:
    raise OSError("no gradient here")


@network(refused="no gradient here")
def raises_in_the_backward(num_classes: int) -> nn.Module:
    return Around(lambda net, x: with_backward(net.net(x), _raise), net=dense_net(num_classes))


@network(refused="modified by an inplace operation")
def in_place_on_what_is_needed(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        x = net.first(x).exp()
        x += 1
        return net.last(x)

    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(8, num_classes))


@network()
def in_place_activations(num_classes: int) -> nn.Module:
    layers = [nn.Linear(FEATURES, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Hardswish(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


@network()
def in_place_on_its_input(num_classes: int) -> nn.Module:
    """The network overwrites its input."""
    return Around(lambda net, x: net.net(x.mul_(0.5)), net=dense_net(num_classes))


@network()
def views_inside(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        x = net.first(x).view(-1, 2, 4).transpose(1, 2)
        x[:, 0] = x[:, 0] * 2
        return net.last(x.reshape(len(x), 8))

    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(8, num_classes))


@network(refused="not proportional to the loss")
def backward_in_the_forward(num_classes: int) -> nn.Module:
    """The forward pass calls backward of an auxiliary loss, which adds to the same gradients."""

    def forward(net: Any, x: Tensor) -> Any:
        if net.training and torch.is_grad_enabled():
            net.net[0](x).square().sum().mul(1e-3).backward()
        return net.net(x)

    return Around(forward, net=dense_net(num_classes))


@network(refused="add up")
def clears_its_gradients(num_classes: int) -> nn.Module:
    """Each forward discards the gradients of the earlier micro-batches."""

    def forward(net: Any, x: Tensor) -> Any:
        net.zero_grad()
        return net.net(x)

    return Around(forward, net=dense_net(num_classes))


@network(refused="changes the parameters")
def steps_in_the_forward(num_classes: int) -> nn.Module:
    """A forward that changes a weight: how often depends on the layout."""

    def forward(net: Any, x: Tensor) -> Any:
        if net.training:
            with torch.no_grad():
                net.net[2].bias.mul_(0.9)
        return net.net(x)

    return Around(forward, net=dense_net(num_classes))


def _clamped(num_classes: int, bound: float) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        if net.training:
            net.net[0].weight.data.clamp_(-bound, bound)
        return net.net(x)

    return Around(forward, net=dense_net(num_classes))


@network(refused="changes the parameters")
def clamps_its_weights(num_classes: int) -> nn.Module:
    return _clamped(num_classes, 0.08)


@network(refused="changes the parameters")
def clamps_its_weights_later(num_classes: int) -> nn.Module:
    """Each forward in training clamps the weights, which changes them only after the first updates."""
    return _clamped(num_classes, 0.0963)


@network(refused="requires_grad")
def frozen_by_the_forward(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        net.net[0].requires_grad_(False)
        return net.net(x)

    return Around(forward, net=dense_net(num_classes))


@network(refused="requires_grad")
def unfrozen_by_the_forward(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    net[0].requires_grad_(False)

    def forward(net: Any, x: Tensor) -> Any:
        net.net[0].requires_grad_(True)
        return net.net(x)

    return Around(forward, net=net)


@network(order="first", named="changes buffers in training")
def freezes_a_layer_later(num_classes: int) -> nn.Module:
    """After 3 updates the network freezes a layer, which torch then no longer changes."""

    def forward(net: Any, x: Tensor) -> Any:
        if net.training:
            net.calls += 1
            net.net[0].requires_grad_(bool(net.calls < 4))
        return net.net(x)

    return Around(forward, net=dense_net(num_classes), calls=torch.tensor(0))


@network(stops="has set requires_grad", raises=True)
def unfreezes_a_layer_later(num_classes: int) -> nn.Module:
    """The network unfreezes parameters that no optimizer has."""
    net = dense_net(num_classes)
    net[0].requires_grad_(False)

    def forward(net: Any, x: Tensor) -> Any:
        if net.training:
            net.calls += 1
            net.net[0].requires_grad_(bool(net.calls >= 4))
        return net.net(x)

    return Around(forward, net=net, calls=torch.tensor(0))


@network(stops="not finite")
def logits_are_nan(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x).log(), net=dense_net(num_classes))


@network(stops="gradient is not finite")
def gradient_is_nan(num_classes: int) -> nn.Module:
    """A finite loss whose gradient is 0/0, at the square root of 0."""
    return Around(
        lambda net, x: net.net(x) + (net.net(x) * 0).square().sum(1, keepdim=True).sqrt(), net=dense_net(num_classes)
    )


@network(stops="a sample that it cannot take", raises=True)
def raises_late(num_classes: int) -> nn.Module:
    """Fails on a sample that only training reaches."""

    def forward(net: Any, x: Tensor) -> Any:
        if bool((x[:, 0] > 2.5).any()):
            raise RuntimeError("a sample that it cannot take, in the second stage")
        return net.net(x)

    return Around(forward, net=dense_net(num_classes))
