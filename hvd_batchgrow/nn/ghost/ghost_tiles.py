"""How the GPU kernels of ghost batch norm cut their work; a matter of numbers, decided without a GPU."""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

_WHOLE = 2**14
"""Values of some channels of a ghost batch that one program holds in registers, and so reads once."""
_TILE = 2**12
"""Values that a program has in hand at a time where it cannot hold all."""
_MAX_SPLITS = 64
"""Programs that share a channel of a ghost batch."""
_PARTS_SHARE = 0.25
"""Each of them later reads what all have found, two numbers a channel: at most so much for each value of its own."""
_VECTOR_BYTES, _LINE_BYTES = 16, 128
"""What a thread, and what a GPU, likes to read at one place."""
_VALUES_PER_WARP = 2**9
_MAX_WARPS = 16
_MAX_OFFSET = 2**30


class Tiles(NamedTuple):
    """A tile is what a program has in hand: some values of some channels of one ghost batch."""

    num_values: int
    """Of each channel; a power of two, as the next."""
    num_channels: int
    num_per_program: int
    """Tiles, one after the other."""
    num_splits: int
    """Programs that share a channel of a ghost batch."""
    num_warps: int


def choose_tiles(num_values: int, num_channels: int, num_pixels: int, value_bytes: int) -> Tiles:
    """Cut a ghost batch; all alike, however many there are, so that none feels the others to the bit.

    The limits above are estimates for an H100 and its like, from its registers and bandwidth; they
    have not been tuned on one.

    Args:
        num_values: M, of each channel of a ghost batch: γ times pixels.
        num_channels: C.
        num_pixels: neighbours in memory that belong to one channel: H·W if contiguous, 1 if channels_last.
        value_bytes: of one value.
    """
    run_bytes = num_pixels * value_bytes
    width = _width(_VECTOR_BYTES, run_bytes, num_channels)
    height = power_of_two(num_values)
    if height * width <= _WHOLE:
        while height * width < _VALUES_PER_WARP and width < num_channels:
            width *= 2
        return Tiles(height, width, 1, 1, _num_warps(height * width))
    width = _width(_LINE_BYTES, run_bytes, num_channels)
    height = max(1, _TILE // width)
    num_tiles = _over(num_values, height)
    # 2 · splits <= share · values / splits
    max_splits = min(_MAX_SPLITS, max(1, isqrt(int(num_values * _PARTS_SHARE / 2))))
    num_per_program = _over(num_tiles, max_splits)
    return Tiles(height, width, num_per_program, _over(num_tiles, num_per_program), _num_warps(height * width))


def fits(num_values: int) -> bool:
    """Whether places in a ghost batch of M · C values are numbers of 32 bits, those of a tile beyond its end too."""
    return num_values <= _MAX_OFFSET


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def _width(wanted_bytes: int, run_bytes: int, num_channels: int) -> int:
    return min(power_of_two(_over(wanted_bytes, run_bytes)), power_of_two(num_channels))


def _num_warps(num_values: int) -> int:
    return max(1, min(_MAX_WARPS, num_values // _VALUES_PER_WARP))


def _over(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)
