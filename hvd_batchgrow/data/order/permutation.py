"""A permutation of 0 … N-1, computed entry by entry without an array of N entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 16
"""10 rounds leave a bias in the frequencies of the 120 orders of five entries; 14 do not."""
_BLOCK = 1 << 13  # five arrays of this many uint64 fit into a core's cache
_32 = np.uint64(32)


class Permutation:
    """A keyed permutation of 0 … N-1, in O(1) memory.

    An index is written as (l, r) with l < a and r < b, where a·b >= N is as small as near-equal a and
    b allow. Rounds of a Feistel network with modular addition alternate between the halves:

        l ← (l + F₁(r)) mod a,   r ← (r + F₂(l)) mod b,   l ← (l + F₃(r)) mod a, …

    Subtraction inverts each round, so the rounds together permute the a·b indices. An index that leaves 0 … N-1
    passes through the rounds again until it returns ("cycle walking"). For large N that is one index in √N.

    Fᵢ multiplies, xor-shifts and multiplies modulo 2⁶⁴ with two random odd multipliers, and scales the upper half of
    the result to 0 … a-1 (or b-1).

    Args:
        num_entries: N, 1 … 2⁶⁰.
        keys: 2 · `ROUNDS` random numbers of 64 bits.

    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", §5 (generalized Feistel) and
    §3 (cycle walking).
    """

    def __init__(self, num_entries: int, keys: Sequence[int]) -> None:
        self.num_entries = num_entries
        # One side must be even: if both were odd, each round, and so their product, would be an even permutation.
        left = math.isqrt(num_entries - 1) + 1
        left += left % 2
        self._left, self._right = np.uint64(left), np.uint64(-(-num_entries // left))
        self._keys = [np.uint64(key | 1) for key in keys]

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the image of each index in 0 … N-1: int64 of the same shape (n,)."""
        result = np.empty(len(indices), dtype=np.int64)
        for start in range(0, len(indices), _BLOCK):
            part = slice(start, start + _BLOCK)
            result[part] = self._walk(indices[part].astype(np.uint64))
        return result

    def _walk(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        x = self._network(x)
        while len(outside := np.flatnonzero(x >= self.num_entries)):
            x[outside] = self._network(x[outside])
        return x

    def _network(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        halves = list(np.divmod(x, self._right))
        sides = (self._left, self._right)
        mixed, shifted = np.empty_like(x), np.empty_like(x)
        for k in range(ROUNDS):
            target, other, side = halves[k % 2], halves[1 - k % 2], sides[k % 2]
            np.multiply(other, self._keys[2 * k], out=mixed)
            mixed += self._keys[2 * k]  # otherwise 0 would always map to 0
            np.right_shift(mixed, _32, out=shifted)
            mixed ^= shifted
            mixed *= self._keys[2 * k + 1]
            mixed >>= _32
            mixed *= side
            mixed >>= _32
            target += mixed
            np.subtract(target, side, out=shifted)  # below 0 it wraps to a huge number
            np.minimum(target, shifted, out=target)
        halves[0] *= self._right
        halves[0] += halves[1]
        return halves[0]
