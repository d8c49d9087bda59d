"""Outputs of every form, and special kinds of modules."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from tests.fuzz.zoo.entry import FEATURES, Around, dense_net, network


@network()
def output_in_float64(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x).double(), net=dense_net(num_classes))


@network()
def output_in_bfloat16(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x).bfloat16(), net=dense_net(num_classes))


@network()
def output_transposed(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x).t().contiguous().t(), net=dense_net(num_classes))


@network()
def output_expanded(num_classes: int) -> nn.Module:
    """The same logits for each sample."""
    return Around(lambda net, x: net.logits.expand(len(x), -1), logits=nn.Parameter(torch.zeros(num_classes)))


@network()
def output_in_place(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x).mul_(2), net=dense_net(num_classes))


@network()
def output_is_its_input(num_classes: int) -> nn.Module:
    return Around(lambda net, x: x[:, :num_classes] * net.scale, scale=nn.Parameter(torch.ones(num_classes)))


@network(refused="must be logits")
def output_tuple(num_classes: int) -> nn.Module:
    return Around(lambda net, x: (net.net(x), x), net=dense_net(num_classes))


@network(refused="must be logits")
def output_dict(num_classes: int) -> nn.Module:
    return Around(lambda net, x: {"logits": net.net(x)}, net=dense_net(num_classes))


@network(refused="must be logits")
def output_of_other_classes(num_classes: int) -> nn.Module:
    return dense_net(num_classes + 1)


@network(refused="must be logits")
def output_of_sequences(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (9, 12)), nn.Linear(12, num_classes))


@network(refused="must be logits")
def output_of_integers(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x).long(), net=dense_net(num_classes))


@network(refused="must be logits")
def output_complex(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x) + 0j, net=dense_net(num_classes))


@network(refused="must be logits")
def output_sparse(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x).to_sparse(), net=dense_net(num_classes))


class Logits(Tensor):
    """A subclass of Tensor."""


@network()
def output_of_a_subclass(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.net(x).as_subclass(Logits), net=dense_net(num_classes))


# --- modules ---------------------------------------------------------------------------------------


class Steady(nn.LazyLinear):
    """A lazy layer whose initial weights do not depend on when it is initialized."""

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params() and self.in_features:
            with torch.no_grad():
                count = self.weight.numel()
                self.weight.copy_(torch.linspace(-0.3, 0.3, count).sin().view_as(self.weight))
                self.bias.zero_()


@network()
def lazy_linear(num_classes: int) -> nn.Module:
    return nn.Sequential(Steady(8), nn.Tanh(), Steady(num_classes))


@network()
def lazy_batch_norm(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Linear(8, num_classes))


@network()
def lazy_and_initialized(num_classes: int) -> nn.Module:
    net = nn.Sequential(Steady(8), nn.Tanh(), Steady(num_classes))
    net(torch.zeros(2, FEATURES))
    return net


class Scriptable(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = torch.tanh(x)
        return self.last(x)  # type: ignore[no-any-return]  # TorchScript reads the annotation


@network(refused="TorchScript")
def torchscript(num_classes: int) -> nn.Module:
    return torch.jit.script(Scriptable(num_classes))


@network(refused="TorchScript")
def torchscript_inside(num_classes: int) -> nn.Module:
    return nn.Sequential(torch.jit.script(Scriptable(6)), nn.Linear(6, num_classes))


@network(refused="TorchScript")
def torchscript_traced(num_classes: int) -> nn.Module:
    return cast(nn.Module, torch.jit.trace(Scriptable(num_classes), torch.zeros(2, FEATURES)))


@network(refused="TorchScript")
def torchscript_with_batch_norm(num_classes: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, num_classes))
    return torch.jit.script(net)


@network(refused="TorchScript")
def torchscript_with_dropout(num_classes: int) -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, num_classes)))


@network(refused="compiled already")
def compiled(num_classes: int) -> nn.Module:
    return cast(nn.Module, torch.compile(dense_net(num_classes), backend="aot_eager"))


@network(refused="compiled already")
def compiled_with_batch_norm(num_classes: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, num_classes))
    return cast(nn.Module, torch.compile(net, backend="eager"))


@network()
def traced_by_fx(num_classes: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, num_classes))
    return torch.fx.symbolic_trace(net)


@network(refused="wrapped in DataParallel")
def data_parallel(num_classes: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, num_classes))
    return nn.DataParallel(net)


@network()
def ends_in_evaluation(num_classes: int) -> nn.Module:
    """The function returns the network in evaluation mode."""
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, num_classes))
    return net.eval()


@network()
def renames_its_state(num_classes: int) -> nn.Module:
    net = dense_net(num_classes)

    def save(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}0.")]:
            state[key.replace("0.", "first.", 1)] = state.pop(key)

    def load(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}first.")]:
            state[key.replace("first.", "0.", 1)] = state.pop(key)

    net.register_state_dict_post_hook(save)
    net.register_load_state_dict_pre_hook(load)
    return net


@network()
def overrides_call(num_classes: int) -> nn.Module:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = dense_net(num_classes)

        def __call__(self, x: Tensor) -> Any:
            return self.net(x)

    return Called()


@network(refused="forward|fails")
def without_a_forward(num_classes: int) -> nn.Module:
    net = nn.Module()
    net.layer = nn.Linear(FEATURES, num_classes)
    return net


@network(refused="must return a torch.nn.Module")
def a_function(num_classes: int) -> Any:
    return lambda x: x


@network(refused="RecursionError|fails|recursion")
def holds_itself(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        return net(x)

    return Around(forward, net=dense_net(num_classes))


@network()
def runs_in_threads(num_classes: int) -> nn.Module:
    """Two branches, each computed by a separate thread."""

    def forward(net: Any, x: Tensor) -> Any:
        found: dict[int, Tensor] = {}
        is_enabled = torch.is_grad_enabled()

        def work(index: int) -> None:
            with torch.set_grad_enabled(is_enabled):
                found[index] = net.branches[index](x)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found[0] + found[1]

    return Around(forward, branches=nn.ModuleList([dense_net(num_classes), dense_net(num_classes)]))


@network()
def runs_on_a_list_of_modules(num_classes: int) -> nn.Module:
    layers = {"hidden": nn.Linear(FEATURES, 8), "act": nn.Tanh(), "out": nn.Linear(8, num_classes)}

    def forward(net: Any, x: Tensor) -> Any:
        for name in ("hidden", "act", "out"):
            x = net.layers[name](x)
        return x

    return Around(forward, layers=nn.ModuleDict(layers))
