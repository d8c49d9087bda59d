"""Dropout that drops the same values of a sample in every layout."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.keyed_random import KeyedModule, fewest_bits
from hvd_batchgrow.nn.modes import modes_of
from hvd_batchgrow.nn.overridden import has_hooks, has_own_methods

Unit = Literal["value", "channel", "sample"]


class KeyedDropout(KeyedModule):
    """Set parts of a sample to 0 with probability p, and scale the rest by 1/(1-p). In evaluation, the identity.

    Whether a part stays depends only on the random numbers of `KeyedModule` and the part's position in the sample.
    Outside an update, where samples have no keys, it draws from torch's generator, like `nn.Dropout`.

    Shapes: input and output (n, …); with keys, n of them.

    Args:
        p: probability, in [0, 1).
        unit: the part that is set to 0 as a whole: a value (`nn.Dropout`), a channel, which is an index of the
            second dimension (`nn.Dropout2d`), or the sample (stochastic depth, drop path).
        rescale: whether the rest is scaled; one form of drop path does not scale it.
        inplace: whether the input itself is changed in training.

    Raises:
        ValueError: p is not in [0, 1).

    Source: Srivastava et al. 2014, JMLR 15, section 10 (inverted).
    """

    kind = "dropout"

    def __init__(self, p: float = 0.5, unit: Unit = "value", *, rescale: bool = True, inplace: bool = False) -> None:
        super().__init__()
        self.drop_prob = p
        self.unit = unit
        self.rescale = rescale
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Drop parts of each sample. Raises ValueError if the number of keys is not the number of samples."""
        if not self.training or self.p == 0:
            return x
        factors = self._keep(x).to(x.dtype) / (1 - self.p if self.rescale else 1)
        return x.mul_(factors) if self.inplace else x * factors

    def _keep(self, x: Tensor) -> Tensor:
        """Return whether each part of x stays, in a shape that broadcasts to x."""
        kept = {"value": x.dim(), "channel": 2, "sample": 1}[self.unit]
        shape = (*x.shape[:kept], *[1] * (x.dim() - kept))
        bits = self.random_bits(x.shape[0], math.prod(shape[1:]), x.device)
        if bits is None:
            return torch.rand(shape, device=x.device) >= self.p
        return (bits >= fewest_bits(self.p)).view(shape)

    @property
    def drop_prob(self) -> float:
        """`p`, under the name in timm's `DropPath`. Setting it raises ValueError for a value that is not in [0, 1)."""
        return self.p

    @drop_prob.setter
    def drop_prob(self, p: float) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"p = {p} must be in [0, 1)")
        self.p = p

    def extra_repr(self) -> str:
        """Return the arguments that `print(model)` shows."""
        others = ("" if self.rescale else ", rescale=False") + (", inplace=True" if self.inplace else "")
        return f"p={self.p}, unit={self.unit!r}{others}"


def convert_dropout(model: nn.Module) -> nn.Module:
    """Replace the dropout modules of torch, timm and torchvision by keyed dropout.

    These are `nn.Dropout`, `nn.Dropout1d` … `3d`, timm's `DropPath` and torchvision's `StochasticDepth` in mode
    "row". Others, such as `nn.AlphaDropout`, your own classes of these names, and calls of `nn.functional`, are not
    replaced. Neither are modules with hooks or with a mode that `model.train()` or `model.eval()` sets by itself, such
    as dropout that stays in evaluation mode in training.

    Args:
        model: changed in place.

    Returns:
        The model, or a keyed dropout if the model itself is a dropout module.
    """
    in_training, in_evaluation = modes_of(model, training=True), modes_of(model, training=False)
    follows = [module for module in model.modules() if in_training[module] and not in_evaluation[module]]
    keyed = {module: made for module in follows if (made := _keyed(module))}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() omits the second name of a shared module
            if child in keyed:
                parent._modules[name] = keyed[child]
    return keyed.get(model, model)


def _keyed(module: nn.Module) -> KeyedDropout | None:
    """Return the keyed dropout that replaces a module; None if the module is not a known dropout, or has hooks."""
    if has_hooks(module) or has_own_methods(module):
        return None
    made = _from_torch(module) or _from_timm(module) or _from_torchvision(module)
    return made.train(module.training) if made else None


def _from_torch(module: nn.Module) -> KeyedDropout | None:
    # The exact type, not isinstance: a subclass may behave differently.
    units: dict[type[nn.Module], Unit] = {nn.Dropout: "value"}
    units |= dict.fromkeys((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "channel")
    unit = units.get(type(module))
    p = getattr(module, "p", 1.0)
    return KeyedDropout(p, unit, inplace=getattr(module, "inplace", False)) if unit and p < 1 else None


def _from_timm(module: nn.Module) -> KeyedDropout | None:
    p = getattr(module, "drop_prob", None)
    if not _is(module, "timm", "DropPath") or not isinstance(p, (int, float)) or p >= 1:
        return None
    return KeyedDropout(p, "sample", rescale=getattr(module, "scale_by_keep", True))


def _from_torchvision(module: nn.Module) -> KeyedDropout | None:
    if not _is(module, "torchvision", "StochasticDepth") or getattr(module, "mode", None) != "row":
        return None
    p = getattr(module, "p", 1.0)
    return KeyedDropout(p, "sample") if p < 1 else None


def _is(module: nn.Module, package: str, name: str) -> bool:
    """Return whether a package defines the module's class, without importing the package."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.partition(".")[0] == package
