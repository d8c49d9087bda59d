"""Norms of many kinds."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune

from tests.fuzz.zoo.entry import FEATURES, Around, images, in_format, network
from tests.fuzz.zoo.layers import Mean


def _dense(num_classes: int, *norms: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), *norms, nn.Tanh(), nn.Linear(8, num_classes))


def _conv(num_classes: int, *norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(images(), nn.Conv2d(3, 8, 3), *norms, nn.Tanh(), Mean(), nn.Linear(8, num_classes))


@network()
def batch_norm_1d(num_classes: int) -> nn.Module:
    return _dense(num_classes, nn.BatchNorm1d(8))


@network()
def batch_norm_of_sequences(num_classes: int) -> nn.Module:
    layers = [nn.Unflatten(1, (3, 36)), nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Tanh(), Mean()]
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


@network()
def batch_norm_2d(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.BatchNorm2d(8))


@network()
def batch_norm_channels_last(num_classes: int) -> nn.Module:
    return in_format(_conv(num_classes, nn.BatchNorm2d(8)), torch.channels_last)


@network(optim="adam")
def batch_norm_by_adam(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.BatchNorm2d(8))


@network()
def batch_norm_without_weights(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.BatchNorm2d(8, affine=False))


@network()
def batch_norm_frozen_weights(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.BatchNorm2d(8).requires_grad_(False))


@network()
def batch_norm_frozen_bias(num_classes: int) -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.bias.requires_grad_(False)
    return _conv(num_classes, norm)


@network()
def batch_norm_momentum_none(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.BatchNorm2d(8, momentum=None))


@network()
def batch_norm_eps_0(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.BatchNorm2d(8, eps=0.0))


@network(refused="track_running_stats=False")
def batch_norm_without_statistics(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.BatchNorm2d(8, track_running_stats=False))


@network(refused="BatchNorm3d")
def batch_norm_3d(num_classes: int) -> nn.Module:
    layers = [nn.Unflatten(1, (4, 3, 3, 3)), nn.Conv3d(4, 5, 2), nn.BatchNorm3d(5), Mean()]
    return nn.Sequential(*layers, nn.Linear(5, num_classes))


@network()
def sync_batch_norm(num_classes: int) -> nn.Module:
    return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(_conv(num_classes, nn.BatchNorm2d(8))))


@network(refused="gives 4 ghost batches instead of 2 to norm")
def batch_norm_twice(num_classes: int) -> nn.Module:
    norm = nn.BatchNorm2d(8)
    return _conv(num_classes, norm, nn.Tanh(), norm)


@network(refused="norm")
def batch_norm_unused(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.head(x), head=nn.Linear(FEATURES, num_classes), spare=nn.BatchNorm1d(8))


class Still(nn.BatchNorm2d):
    """A norm that stays in evaluation mode."""

    def train(self, mode: bool = True) -> Still:
        return super().train(False)


@network(refused="overrides train")
def batch_norm_in_evaluation(num_classes: int) -> nn.Module:
    return _conv(num_classes, Still(8))


@network(refused="overrides train")
def batch_norm_with_a_train_that_does_nothing(num_classes: int) -> nn.Module:
    norm = nn.BatchNorm2d(8).eval()
    norm.train = lambda mode=True: norm  # type: ignore[method-assign]
    return _conv(num_classes, norm)


@network(refused="parametrized")
def batch_norm_parametrized(num_classes: int) -> nn.Module:
    norm = nn.BatchNorm2d(8)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return _conv(num_classes, norm)


@network(refused="hooks")
def batch_norm_pruned(num_classes: int) -> nn.Module:
    return _conv(num_classes, prune.random_unstructured(nn.BatchNorm2d(8), "weight", 0.5))


class StillInside(nn.Module):
    """A network that keeps its norm in evaluation mode."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = _conv(num_classes, nn.BatchNorm2d(8))

    def train(self, mode: bool = True) -> StillInside:
        super().train(mode)
        self.net[2].train(False)
        return self

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


@network()
def batch_norm_kept_in_evaluation(num_classes: int) -> nn.Module:
    return StillInside(num_classes)


class StillByClass(nn.Sequential):
    """A network that keeps its norms and dropout in evaluation mode, which it finds by their classes."""

    def train(self, mode: bool = True) -> StillByClass:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, (_BatchNorm, nn.Dropout)):
                module.eval()
        return self


@network(quick=True)
def batch_norm_kept_in_evaluation_by_class(num_classes: int) -> nn.Module:
    return StillByClass(_conv(num_classes, nn.BatchNorm2d(8), nn.Dropout(0.5)))


@network()
def batch_norm_tied_weights(num_classes: int) -> nn.Module:
    first, second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    second.weight = first.weight
    return _conv(num_classes, first, nn.Tanh(), second)


@network(refused="running statistics of another norm")
def batch_norm_shared_statistics(num_classes: int) -> nn.Module:
    """Two norms that share running statistics."""
    first, second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    second.running_mean, second.running_var = first.running_mean, first.running_var
    return _conv(num_classes, first, nn.Tanh(), second)


@network()
def batch_norm_in_float64(num_classes: int) -> nn.Module:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8).double()

        def forward(self, x: Tensor) -> Any:
            return self.norm(x.double()).float()

    return _conv(num_classes, Cast())


@network()
def layer_norm(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.LayerNorm([8, 4, 4]))


@network()
def group_norm(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.GroupNorm(4, 8))


@network()
def rms_norm(num_classes: int) -> nn.Module:
    return _dense(num_classes, nn.RMSNorm(8))


@network()
def instance_norm(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.InstanceNorm2d(8, affine=True))


@network()
def local_response_norm(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.LocalResponseNorm(3))


@network(named="changes buffers in training", order="first")
def instance_norm_with_statistics(num_classes: int) -> nn.Module:
    return _conv(num_classes, nn.InstanceNorm2d(8, affine=True, track_running_stats=True))


@network(exact_refused="samples of a batch affect each other", order="layout")
def normalized_over_the_batch(num_classes: int) -> nn.Module:
    """A batch norm written by hand."""

    def forward(net: Any, x: Tensor) -> Any:
        x = net.first(x)
        return net.last(((x - x.mean(0)) / (x.std(0) + 0.1)).tanh())

    return Around(forward, first=nn.Linear(FEATURES, 8), last=nn.Linear(8, num_classes))


@network()
def weight_standardized(num_classes: int) -> nn.Module:
    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Any:
            variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
            return self._conv_forward(x, (self.weight - mean) * (variance + 1e-5).rsqrt(), self.bias)

    return nn.Sequential(images(), Conv(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), Mean(), nn.Linear(8, num_classes))
