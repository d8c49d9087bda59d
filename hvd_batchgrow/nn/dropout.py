"""Dropout whose random numbers depend on the sample, not on the rank or micro-batch: equal in every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvd_batchgrow.comm.to_device import to_device
from hvd_batchgrow.data.order.splitmix import MULTIPLIERS, SHIFTS, STEP, mix
from hvd_batchgrow.nn.recompute import is_recomputing

Unit = Literal["value", "channel", "sample"]


class KeyedModule(nn.Module):
    """A module that draws random numbers for each sample by the sample's key: equal in every layout.

    The numbers depend only on the key (seed, epoch, id), the index of this module among the keyed modules of the
    network, and the number of its earlier calls in the same forward. Rank, micro-batch and device have no effect.

    Source: the generator is SplitMix64, Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators",
    figure 17, with a counter as its state.
    """

    kind = "dropout"
    """What errors call it."""

    def __init__(self) -> None:
        super().__init__()
        self._place = 0
        self._keys: Tensor | None = None
        self._keys_of_place: Tensor | None = None
        """Hashes of `_keys` and `_place`, for the first call in the forward."""
        self._num_calls = 0

    def random_bits(self, num_samples: int, num_values: int, device: torch.device) -> Tensor | None:
        """Return random integers in [0, 2²⁴), int64 (samples, values); None outside an update, without keys.

        Raises:
            ValueError: the number of keys is not the number of samples.
        """
        if self._keys is None or self._keys_of_place is None:
            return None
        if len(self._keys) != num_samples:
            raise ValueError(f"{self.kind} got {num_samples} samples, but keys for {len(self._keys)}")
        call = self._count_call()
        keys = _mix(self._keys + _signed(STEP * (self._place << 32 | call))) if call else self._keys_of_place
        counters = torch.arange(1, 1 + num_values, device=device)
        states = torch.add(keys.to(device)[:, None], counters, alpha=_signed(STEP))
        return _scramble(states).bitwise_right_shift_(40).bitwise_and_(0xFFFFFF)

    def _count_call(self) -> int:
        """Return the index of this call in the forward. A call that an activation checkpoint repeats keeps its index.

        Raises:
            ValueError: a checkpoint repeats one of several calls, and it is unknown which one.
        """
        if torch.compiler.is_compiling() or not is_recomputing():  # a compiled backward repeats no Python
            self._num_calls += 1
            return self._num_calls - 1
        if self._num_calls != 1:
            raise ValueError(
                f"an activation checkpoint repeats a {self.kind} that the forward uses {self._num_calls} times, and "
                f"the mask to repeat is unknown: give each place its own {self.kind} module"
            )
        return 0


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

    Raises:
        ValueError: p is not in [0, 1).

    Source: Srivastava et al. 2014, JMLR 15, section 10 (inverted).
    """

    def __init__(self, p: float = 0.5, unit: Unit = "value", *, rescale: bool = True) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p = {p} must be in [0, 1)")
        self.p = p
        self.unit = unit
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        """Drop parts of each sample. Raises ValueError if the number of keys is not the number of samples."""
        if not self.training or self.p == 0:
            return x
        return x * (self._keep(x).to(x.dtype) / (1 - self.p if self.rescale else 1))

    def _keep(self, x: Tensor) -> Tensor:
        """Return whether each part of x stays, in a shape that broadcasts to x."""
        kept = {"value": x.dim(), "channel": 2, "sample": 1}[self.unit]
        shape = (*x.shape[:kept], *[1] * (x.dim() - kept))
        bits = self.random_bits(len(x), math.prod(shape[1:]), x.device)
        if bits is None:
            return torch.rand(shape, device=x.device) >= self.p
        return (bits >= fewest_bits(self.p)).view(shape)

    def extra_repr(self) -> str:
        """Return the arguments that `print(model)` shows."""
        return f"p={self.p}, unit={self.unit!r}{'' if self.rescale else ', rescale=False'}"


def sample_keys(seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> Tensor:
    """Return a key for each sample, int64 (n,).

    Args:
        seed: the run's seed.
        epochs: (n,) epoch of each sample.
        ids: (n,) sample ids.
    """
    keys = mix(np.full(1, seed, dtype=np.uint64))
    for part in (epochs, ids):
        keys = mix(keys + np.asarray(part, dtype=np.uint64))
    return torch.from_numpy(keys.view(np.int64))


def set_sample_keys(dropouts: Sequence[KeyedModule], keys: Tensor | None, device: torch.device | None = None) -> None:
    """Set the keys of the samples of the next forward.

    Args:
        dropouts: all keyed modules of the network, from `keyed_dropouts`.
        keys: (n,), from `sample_keys`; None: draw from torch's generator.
        device: of the forward; None: where the keys are.
    """
    rows: Sequence[Tensor | None] = [None] * (len(dropouts) + 1)
    if keys is not None and dropouts:
        # The host hashes the keys for all dropouts, and one copy brings them to the device.
        steps = torch.tensor([_signed(STEP * (place << 32)) for place in range(len(dropouts))], device=keys.device)
        rows = to_device(torch.cat([_mix(keys + steps[:, None]), keys[None]]), device or keys.device).unbind()
    for place, dropout in enumerate(dropouts):
        dropout._place, dropout._num_calls = place, 0
        dropout._keys_of_place, dropout._keys = rows[place], rows[-1]


def keyed_dropouts(model: nn.Module) -> list[KeyedModule]:
    """Return the keyed dropouts and the ShakeDrops of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, KeyedModule)]


def convert_dropout(model: nn.Module) -> nn.Module:
    """Replace the dropout modules of torch, timm and torchvision by keyed dropout.

    These are `nn.Dropout`, `nn.Dropout1d` … `3d`, timm's `DropPath` and torchvision's `StochasticDepth` in mode
    "row". Others, such as `nn.AlphaDropout` and calls of `nn.functional`, are not replaced.

    Args:
        model: changed in place.

    Returns:
        The model, or a keyed dropout if the model itself is a dropout module.
    """
    keyed = {module: made for module in model.modules() if (made := _keyed(module))}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() omits the second name of a shared module
            if child in keyed:
                parent._modules[name] = keyed[child]
    return keyed.get(model, model)


def _keyed(module: nn.Module) -> KeyedDropout | None:
    """Return the keyed dropout that replaces a module; None if the module is not a known dropout."""
    made = _from_torch(module) or _from_timm(module) or _from_torchvision(module)
    return made.train(module.training) if made else None


def _from_torch(module: nn.Module) -> KeyedDropout | None:
    # The exact type, not isinstance: a subclass may behave differently.
    units: dict[type[nn.Module], Unit] = {nn.Dropout: "value"}
    units |= dict.fromkeys((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "channel")
    unit = units.get(type(module))
    p = getattr(module, "p", 1.0)
    return KeyedDropout(p, unit) if unit and p < 1 else None


def _from_timm(module: nn.Module) -> KeyedDropout | None:
    p = getattr(module, "drop_prob", None)
    if type(module).__name__ != "DropPath" or not isinstance(p, (int, float)) or p >= 1:
        return None
    return KeyedDropout(p, "sample", rescale=getattr(module, "scale_by_keep", True))


def _from_torchvision(module: nn.Module) -> KeyedDropout | None:
    if type(module).__name__ != "StochasticDepth" or getattr(module, "mode", None) != "row":
        return None
    p = getattr(module, "p", 1.0)
    return KeyedDropout(p, "sample") if p < 1 else None


def _signed(value: int) -> int:
    """Return the int64 number with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's output function in place, int64 to int64. Overflow is intended."""
    return _shift_into(_scramble(x), SHIFTS[-1])


def _scramble(x: Tensor) -> Tensor:
    """Apply the output function without its last shift, which changes only the lowest 33 bits."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        x = _shift_into(x, shift).mul_(_signed(multiplier))
    return x


def _shift_into(x: Tensor, shift: int) -> Tensor:
    x ^= (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # torch's >> copies the sign bit
    return x


def fewest_bits(p: float) -> int:
    """Return the least whole number k for which k · 2⁻²⁴ is at least p, rounded to float32."""
    mantissa, exponent = math.frexp(p)
    return math.ceil(math.ldexp(round(mantissa * 2**24), exponent))
