"""Random numbers of modules that depend on the sample, not on the rank or micro-batch: equal in every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvd_batchgrow.comm.to_device import to_device
from hvd_batchgrow.data.order.splitmix import MULTIPLIERS, SHIFTS, STEP, mix
from hvd_batchgrow.nn.activation_checkpointing import is_recomputing


class KeyedModule(nn.Module):
    """A module that draws random numbers for each sample by the sample's key: equal in every layout.

    The numbers depend only on the key (seed, epoch, id), the index of this module among the keyed modules of the
    network, and the number of its earlier calls in the same forward. Rank, micro-batch and device have no effect.

    Source: the generator is SplitMix64, Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators",
    figure 17, with a counter as its state.
    """

    kind: str
    """Name of the module in errors, set by each subclass."""

    def __init__(self) -> None:
        super().__init__()
        self._place = 0
        self._keys: Tensor | None = None
        self._keys_of_place: Tensor | None = None
        """Hashes of `_keys` and `_place`, for the first call in the forward."""
        self._num_calls = 0

    def random_bits(self, num_samples: int, num_values: int, device: torch.device) -> Tensor | None:
        """Return random integers in [0, 2²⁴), int64 (samples, values); None outside an update: samples have no keys.

        Raises:
            ValueError: the number of keys is not the number of samples, such as for an input (steps, samples, …).
        """
        if self._keys is None or self._keys_of_place is None:
            return None
        if len(self._keys) != num_samples:
            raise ValueError(
                f"{self.kind} got an input whose first dimension is {num_samples}, for {len(self._keys)} samples: the "
                "first dimension must be the sample, so use batch_first=True, transpose after the dropout, or reshape "
                "to (samples, …) before it"
            )
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
                f"it is unknown whose random numbers to repeat: give each place its own {self.kind} module"
            )
        return 0


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


def set_sample_keys(modules: Sequence[KeyedModule], keys: Tensor | None, device: torch.device | None = None) -> None:
    """Set the keys of the samples of the next forward.

    Args:
        modules: all keyed modules of the network, from `keyed_modules`.
        keys: (n,), from `sample_keys`; None: draw from torch's generator.
        device: of the forward; None: where the keys are.
    """
    rows: Sequence[Tensor | None] = [None] * (len(modules) + 1)
    if keys is not None and modules:
        # The host hashes the keys for all modules, and one copy brings them to the device.
        steps = torch.tensor([_signed(STEP * (place << 32)) for place in range(len(modules))], device=keys.device)
        rows = to_device(torch.cat([_mix(keys + steps[:, None]), keys[None]]), device or keys.device).unbind()
    for place, module in enumerate(modules):
        module._place, module._num_calls = place, 0
        module._keys_of_place, module._keys = rows[place], rows[-1]


def keyed_modules(model: nn.Module) -> list[KeyedModule]:
    """Return the keyed modules of a model, such as dropout and ShakeDrop, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, KeyedModule)]


def fewest_bits(p: float) -> int:
    """Return the least whole number k for which k · 2⁻²⁴ is at least p, rounded to float32."""
    mantissa, exponent = math.frexp(p)
    return math.ceil(math.ldexp(round(mantissa * 2**24), exponent))


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
