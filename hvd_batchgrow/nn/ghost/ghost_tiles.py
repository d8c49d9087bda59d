"""Divide the work of the GPU kernels of ghost batch norm into tiles. This needs no GPU."""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

_WHOLE = 2**14
"""Most values that one program keeps in registers, so that it reads them only once."""
_TILE = 2**12
"""Values of a tile, if a program cannot keep all its values."""
_MAX_SPLITS = 64
"""Most programs that share a channel of a ghost batch."""
_PARTS_SHARE = 0.25
"""Each of these programs reads two numbers per channel of every other one: at most this fraction of its values."""
_VECTOR_BYTES, _LINE_BYTES = 16, 128
"""Bytes that a thread, and that the GPU, reads efficiently from one place."""
_VALUES_PER_WARP = 2**9
_MAX_WARPS = 16
_MAX_OFFSET = 2**30


class Tiles(NamedTuple):
    """A tile is the part that a program processes at a time: some values of some channels of one ghost batch."""

    num_values: int
    """Values of each channel in a tile, a power of two."""
    num_channels: int
    """Channels of a tile, a power of two."""
    num_per_program: int
    """Tiles that a program processes one after the other."""
    num_splits: int
    """Programs that share a channel of a ghost batch."""
    num_warps: int


def choose_tiles(num_values: int, num_channels: int, num_pixels: int, value_bytes: int) -> Tiles:
    """Choose the tiles of a ghost batch. They do not depend on the number of ghost batches, so results do not either.

    The limits above are estimates from the registers and the bandwidth of an H100. They are not tuned.

    Args:
        num_values: M, values of each channel of a ghost batch: γ times pixels.
        num_channels: C.
        num_pixels: adjacent values in memory of one channel: H·W if contiguous, 1 if channels_last.
        value_bytes: bytes of one value.
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
    """Return whether 32 bits are enough for offsets in a ghost batch of M · C values, plus a tile beyond its end."""
    return num_values <= _MAX_OFFSET


def power_of_two(number: int) -> int:
    """Return the smallest power of two >= number."""
    return 1 << (number - 1).bit_length()


def _width(wanted_bytes: int, run_bytes: int, num_channels: int) -> int:
    return min(power_of_two(_over(wanted_bytes, run_bytes)), power_of_two(num_channels))


def _num_warps(num_values: int) -> int:
    return max(1, min(_MAX_WARPS, num_values // _VALUES_PER_WARP))


def _over(number: int, divisor: int) -> int:
    """Return the quotient, rounded up."""
    return -(-number // divisor)
