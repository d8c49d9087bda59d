"""Measure sample ids/s in chunks of 65,536 on one core, in comparison with NumPy's permutation of as many ids.

python -m benchmarks.stream [--turns 9]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.turns import print_rates, take_turns
from hvd_batchgrow.data.order.stream import Stream

CHUNK, CHUNKS = 1 << 16, 32


def read(num_samples: int) -> int:
    """Read two million ids of a new stream, from a third of the first epoch on; a small set takes many epochs."""
    stream = Stream(num_samples, seed=0)
    start = num_samples // 3
    for k in range(CHUNKS):
        stream.ids(start + k * CHUNK, start + (k + 1) * CHUNK)
    return CHUNK * CHUNKS


def permute() -> int:
    """Shuffle by NumPy, which needs all ids in memory."""
    return len(np.random.default_rng(0).permutation(CHUNK * CHUNKS))


def main() -> None:
    """Time the contestants in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    contestants: dict[str, Callable[[], int]] = {
        f"stream, N = {n:,}": partial(read, n) for n in (50_000, 1_281_167, 10**9)
    }
    numpys = f"numpy, N = {CHUNK * CHUNKS:,}"
    rates = take_turns({**contestants, numpys: permute}, parser.parse_args().turns)
    print_rates(rates, "ids/s", numpys)


if __name__ == "__main__":
    main()
