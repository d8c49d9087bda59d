"""Replace the modules of this package by torch's, so that a network can be used without this package."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.convert import GhostBatchNormAct2d
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d


class _AnyBatchNorm(nn.BatchNorm2d):
    """Batch norm for inputs of 2 to 4 dimensions, followed by the modules that a ghost norm may have."""

    relu: bool = False

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, then drop and activate as the ghost norm does."""
        y = super().forward(input)
        for child in self.children():  # `drop` and `act` of timm's norms
            y = child(y)
        return y.relu() if self.relu else y


def to_plain(model: nn.Module) -> nn.Module:
    """Replace ghost norms by torch's batch norms with the same statistics, and keyed dropout by torch's.

    Names of parameters and buffers stay. Each norm also gets torch's count of batches, 0. A ReLU that a norm computed
    is a module again.

    Args:
        model: in evaluation mode, where both compute the same; changed in place.

    Returns:
        The model, or a norm if the model itself is one.
    """
    for sequence in [module for module in model.modules() if type(module) is nn.Sequential]:
        for (_, norm), (name, after) in pairwise(list(sequence._modules.items())):
            if isinstance(norm, GhostBatchNorm) and not norm._modules and norm.relu and type(after) is nn.Identity:
                norm.relu = False
                sequence._modules[name] = nn.ReLU().train(after.training)
    plain = {module: new for module in model.modules() if (new := _plain(module)) is not None}
    for parent in [*model.modules(), *plain.values()]:
        for name, child in parent._modules.items():
            if child in plain:
                parent._modules[name] = plain[child]
    return plain.get(model, model)


def _plain(module: nn.Module) -> nn.Module | None:
    """Return torch's module for one of this package; None for any other module."""
    if isinstance(module, GhostBatchNorm):
        return _plain_norm(module)
    if type(module) is KeyedDropout and module.unit != "sample" and module.rescale:
        dropout = nn.Dropout2d(module.p) if module.unit == "channel" else nn.Dropout(module.p)
        return dropout.train(module.training)
    return None


def _plain_norm(norm: GhostBatchNorm) -> nn.Module:
    kinds = {GhostBatchNorm1d: nn.BatchNorm1d, GhostBatchNorm2d: nn.BatchNorm2d}
    kind = kinds.get(type(norm), _AnyBatchNorm) if not norm.relu else _AnyBatchNorm
    with torch.device("meta"):  # its own tensors are replaced
        plain = kind(norm.num_features, norm.eps, norm.momentum, norm.affine)
    plain.weight, plain.bias = norm.weight, norm.bias  # type: ignore[assignment]
    plain.running_mean, plain.running_var = norm.running_mean, norm.running_var
    plain.num_batches_tracked = torch.tensor(0, device=norm.running_mean.device)
    if isinstance(plain, _AnyBatchNorm):
        plain.relu = norm.relu and not isinstance(norm, GhostBatchNormAct2d)
    for name, child in norm.named_children():
        plain.add_module(name, child)
    return plain.train(norm.training)
