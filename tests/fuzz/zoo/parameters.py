"""Parameters of every shape and memory layout, and parameters that are related to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from tests.fuzz.zoo.entry import FEATURES, Around, dense_net, images, linear, network
from tests.fuzz.zoo.layers import Mean


def _with_weight(num_classes: int, weight: Tensor) -> nn.Module:
    """A dense network whose second layer has a given weight (num_classes, 10)."""
    net = dense_net(num_classes)
    net[2].weight = nn.Parameter(weight)
    return net


@network()
def column_slice(num_classes: int) -> nn.Module:
    return _with_weight(num_classes, (torch.randn(num_classes, 30) / 4)[:, :10])


@network()
def row_slice(num_classes: int) -> nn.Module:
    return _with_weight(num_classes, (torch.randn(3 * num_classes, 10) / 4)[num_classes : 2 * num_classes])


@network(optim="lars")
def every_other_row(num_classes: int) -> nn.Module:
    return _with_weight(num_classes, (torch.randn(2 * num_classes, 20) / 4)[::2, 1::2])


@network(optim="adam")
def transposed_view(num_classes: int) -> nn.Module:
    return _with_weight(num_classes, (torch.randn(10, num_classes) / 4).t())


@network()
def slice_of_a_conv(num_classes: int) -> nn.Module:
    net = nn.Sequential(images(), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(6, 5, 2), Mean(), nn.Linear(5, num_classes))
    weight = torch.randn(9, 3, 4, 4)[2:8, :, 1:, :3] / 4
    net[1].weight, net[1].bias = nn.Parameter(weight), nn.Parameter(torch.zeros(12)[::2])
    return net


@network()
def permuted_conv(num_classes: int) -> nn.Module:
    net = nn.Sequential(images(), nn.Conv2d(3, 6, 3), nn.ReLU(), Mean(), nn.Linear(6, num_classes))
    net[1].weight = nn.Parameter((torch.randn(3, 3, 6, 3) / 4).permute(2, 0, 3, 1))
    return net


@network(refused="at one address")
def expanded_bias(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    net[0].bias = nn.Parameter(torch.zeros(1).expand(10))
    return net


@network(refused="at one address")
def expanded_weight(num_classes: int) -> nn.Module:
    return _with_weight(num_classes, (torch.randn(1, 10) / 4).expand(num_classes, 10))


@network(refused="at one address")
def overlapping_windows(num_classes: int) -> nn.Module:
    return _with_weight(num_classes, (torch.randn(30) / 4).as_strided((num_classes, 10), (5, 1)))


@network()
def two_halves_of_one_tensor(num_classes: int) -> nn.Module:
    store = torch.randn(2, 10, 10) / 4
    return nn.Sequential(
        nn.Linear(FEATURES, 10), *[_linear(half) for half in store.unbind()], nn.Linear(10, num_classes)
    )


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight)
    return layer


@network(refused="shares memory with")
def two_parameters_in_one_place(num_classes: int) -> nn.Module:
    """torch updates both, one after the other, each with its own gradient and momentum."""
    weight = torch.randn(10, 10) / 4
    return nn.Sequential(
        nn.Linear(FEATURES, 10), _linear(weight), nn.Tanh(), _linear(weight.t()), nn.Linear(10, num_classes)
    )


@network()
def tied(num_classes: int) -> nn.Module:
    first, second = nn.Linear(10, 10), nn.Linear(10, 10)
    second.weight = first.weight
    return nn.Sequential(nn.Linear(FEATURES, 10), first, nn.Tanh(), second, nn.Linear(10, num_classes))


@network()
def tied_transposed_in_forward(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        code = net.encoder(x).tanh()
        return net.head(functional.linear(code, net.encoder.weight.t()))

    return Around(forward, encoder=nn.Linear(FEATURES, 6), head=nn.Linear(FEATURES, num_classes))


@network()
def scalars(num_classes: int) -> nn.Module:
    return Around(
        lambda net, x: net.net(x * net.scale) * net.temperature.exp() + net.shift,
        scale=nn.Parameter(torch.tensor(1.5)),
        net=dense_net(num_classes),
        temperature=nn.Parameter(torch.tensor(0.1)),
        shift=nn.Parameter(torch.zeros(1)),
    )


@network()
def empty_parameters(num_classes: int) -> nn.Module:
    """Parameters with 0 entries, of 1 and 2 dimensions, as the first and the last parameter."""
    return Around(
        lambda net, x: net.net(x) + net.first.sum() + net.last.sum(),
        first=nn.Parameter(torch.zeros(0)),
        net=dense_net(num_classes),
        last=nn.Parameter(torch.zeros(3, 0)),
    )


@network(optim="lars")
def empty_parameters_by_lars(num_classes: int) -> nn.Module:
    return Around(
        lambda net, x: net.net(x) + net.last.sum(), net=dense_net(num_classes), last=nn.Parameter(torch.zeros(3, 0))
    )


@network()
def single_entries(num_classes: int) -> nn.Module:
    weights = nn.ParameterList([torch.full((1,) * (1 + k % 5), 0.9) for k in range(20)])

    def forward(net: Any, x: Tensor) -> Any:
        for weight in net.weights:
            x = x * weight.view(1)
        return net.net(x)

    return Around(forward, weights=weights, net=dense_net(num_classes))


@network(quick=False)
def several_buckets(num_classes: int) -> nn.Module:
    """Two weights of 20 MB, each larger than a gradient bucket."""
    return nn.Sequential(nn.Linear(FEATURES, 48_000), nn.Tanh(), nn.Linear(48_000, num_classes), nn.Linear(4, 4))


@network()
def many_parameters(num_classes: int) -> nn.Module:
    layers = [nn.Linear(6, 6) for _ in range(100)]

    def forward(net: Any, x: Tensor) -> Any:
        x = net.first(x)
        for layer in net.layers:
            x = x + layer(x).tanh() / 10
        return net.last(x)

    first, last = nn.Linear(FEATURES, 6), nn.Linear(6, num_classes)
    return Around(forward, first=first, layers=nn.ModuleList(layers), last=last)


@network()
def parameter_dict(num_classes: int) -> nn.Module:
    names = ["weight", "größe", "a b", "0"]
    weights = nn.ParameterDict({name: torch.randn(num_classes, FEATURES) / 10 for name in names})
    return Around(lambda net, x: sum(functional.linear(x, w) for w in net.weights.values()), weights=weights)


@network()
def frozen_layer(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    net[0].requires_grad_(False)
    return net


@network()
def frozen_but_one_bias(num_classes: int) -> nn.Module:
    net = dense_net(num_classes).requires_grad_(False)
    linear(net, 0).bias.requires_grad_(True)
    return net


@network()
def low_rank_adapter(num_classes: int) -> nn.Module:
    """LoRA: a frozen layer plus a product of two thin matrices, one of which is zero."""

    def forward(net: Any, x: Tensor) -> Any:
        return net.head((net.base(x) + x @ net.down @ net.up).tanh())

    return Around(
        forward,
        base=nn.Linear(FEATURES, 10).requires_grad_(False),
        down=nn.Parameter(torch.randn(FEATURES, 2) / 10),
        up=nn.Parameter(torch.zeros(2, 10)),
        head=nn.Linear(10, num_classes),
    )


@network()
def unreached(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x), net=dense_net(num_classes), spare=nn.Linear(5, 5))


@network(optim="adamw")
def unreached_by_adamw(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x), spare=nn.Linear(5, 5), net=dense_net(num_classes))


@network(optim="lars")
def unreached_by_lars(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x), spare=nn.Linear(5, 5), net=dense_net(num_classes))


@network()
def reached_by_some_samples(num_classes: int) -> nn.Module:
    """Two experts, one for each sample. Some ghost batches use only one of them."""

    def forward(net: Any, x: Tensor) -> Any:
        chosen = (x[:, 0] > 1.0).long()
        out = x.new_zeros(len(x), num_classes)
        for index, expert in enumerate(net.experts):
            rows = (chosen == index).nonzero().flatten()
            if len(rows):
                out = out.index_copy(0, rows, expert(x[rows]))
        return out

    return Around(forward, experts=nn.ModuleList([dense_net(num_classes), dense_net(num_classes)]))


@network()
def reached_by_one_update(num_classes: int) -> nn.Module:
    """An expert for rare samples. torch skips its weights in most updates, which have no such sample."""

    def forward(net: Any, x: Tensor) -> Any:
        out = net.net(x)
        rows = (x[:, 0] > 2.1).nonzero().flatten()
        return out.index_add(0, rows, net.rare(x[rows])) if len(rows) else out

    return Around(forward, net=dense_net(num_classes), rare=nn.Linear(FEATURES, num_classes))


@network()
def gradient_of_zeros(num_classes: int) -> nn.Module:
    """A layer whose output is multiplied by 0: torch still decays its weights."""
    return Around(
        lambda net, x: net.net(x) + 0 * net.spare(x), net=dense_net(num_classes), spare=nn.Linear(FEATURES, 4)
    )


@network()
def buffer_that_is_a_view_of_a_weight(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    net.register_buffer("alias", linear(net, 0).weight.detach()[0])
    return net


@network(refused="on the meta device")
def on_the_meta_device(num_classes: int) -> nn.Module:
    return dense_net(num_classes).to("meta")


@network(refused="sparse")
def sparse_weight(num_classes: int) -> nn.Module:
    weight = nn.Parameter((torch.randn(FEATURES, num_classes) / 4).to_sparse())
    return Around(
        lambda net, x: torch.sparse.mm(net.weight.t(), x.t()).t() + net.bias,
        weight=weight,
        bias=nn.Parameter(torch.zeros(num_classes)),
    )


class ParsedModelName(nn.Parameter):
    """A subclass of Parameter."""


@network()
def subclass_of_parameter(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    net[2].weight = ParsedModelName(torch.randn(num_classes, 10) / 4)
    return net


@network(refused="no parameters")
def parameters_outside_the_module(num_classes: int) -> nn.Module:
    hidden = [torch.randn(FEATURES, num_classes).div_(10).requires_grad_()]
    return Around(lambda net, x: x @ hidden[0])


@network(refused="parameters late")
def parameter_made_in_forward(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        if not hasattr(net, "late"):
            net.late = nn.Parameter(torch.ones(num_classes))
        return net.net(x) * net.late

    return Around(forward, net=dense_net(num_classes))


# --- parametrizations and masks --------------------------------------------------------------------


@network()
def weight_norm(num_classes: int) -> nn.Module:
    norm = parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(FEATURES, 10)), nn.Tanh(), norm(nn.Linear(10, num_classes), dim=1))


@network()
def old_weight_norm(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    layer = linear(net, 0)
    weight = layer.weight
    del layer._parameters["weight"]
    layer.register_parameter("weight_g", nn.Parameter(torch.norm_except_dim(weight, 2, 0).detach()))
    layer.register_parameter("weight_v", nn.Parameter(weight.detach()))
    layer.register_forward_pre_hook(
        lambda module, _: setattr(module, "weight", torch._weight_norm(module.weight_v, module.weight_g, 0))
    )
    return net


@network()
def orthogonal(num_classes: int) -> nn.Module:
    layer = parametrizations.orthogonal(nn.Linear(10, 10), orthogonal_map="cayley")
    return nn.Sequential(nn.Linear(FEATURES, 10), layer, nn.Tanh(), nn.Linear(10, num_classes))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


@network()
def symmetric(num_classes: int) -> nn.Module:
    layer = nn.Linear(10, 10)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(nn.Linear(FEATURES, 10), layer, nn.Tanh(), nn.Linear(10, num_classes))


@network()
def pruned_by_mask(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.ln_structured(net[2], "weight", 0.3, n=2, dim=1)
    return net


@network()
def pruned_for_good(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)
    prune.random_unstructured(net[0], "weight", 0.5)
    prune.remove(net[0], "weight")
    return net
