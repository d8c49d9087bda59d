"""Measure the resident memory that a second rank on a host adds, for images in memory-mapped arrays.

python -m benchmarks.shared_memory [--gib 4]

Memory is counted as proportional set size: each of two processes that share a page counts half of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

_SHAPE = (32, 32, 3)
_GROUP = 256


def write_arrays(folder: Path, gib: float) -> None:
    """Write the files of a source "numpy" of a given size, piece by piece."""
    num_samples = int(gib * 2**30 / np.prod(_SHAPE))
    train = np.lib.format.open_memmap(folder / "train_images.npy", "w+", np.uint8, (num_samples, *_SHAPE))
    for start in range(0, num_samples, 1 << 16):
        train[start : start + (1 << 16)] = start % 251
    train.flush()
    np.save(folder / "test_images.npy", np.zeros((10, *_SHAPE), np.uint8))
    for name, count in (("train", num_samples), ("test", 10)):
        np.save(folder / f"{name}_labels.npy", np.arange(count) % 10)


def read_share(folder: Path, rank: int, ranks: int) -> None:
    """Run a rank: read its share of an epoch, print "ready", and wait."""
    import torch

    from hvd_batchgrow.config import DataSection
    from hvd_batchgrow.data.datasets.dataset import raise_bad
    from hvd_batchgrow.data.load_source import load_source
    from hvd_batchgrow.data.order.stream import Stream
    from hvd_batchgrow.data.pipeline.reader import Reader

    torch.set_num_threads(1)
    num_samples = len(np.load(folder / "train_labels.npy", mmap_mode="r"))
    data = DataSection(source="numpy", root=str(folder), num_samples=num_samples, mean=(0.5,) * 3, std=(0.25,) * 3)
    source = load_source(data, 0, lambda *_: None)
    reader = Reader(data, source, torch.device("cpu"), 1, raise_bad, _GROUP)
    for _ in islice(reader.training(Stream(num_samples, 0), _GROUP, rank, ranks), num_samples // _GROUP // ranks):
        pass
    print("ready", flush=True)
    sys.stdin.read()


def resident_gib(folder: Path, ranks: int) -> float:
    """Return the total proportional set size of some ranks after each has read its share."""
    command = [sys.executable, "-m", "benchmarks.shared_memory", "--ranks", str(ranks), "--folder", str(folder)]
    processes = [
        subprocess.Popen([*command, "--rank", str(k)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for k in range(ranks)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    total_kib = 0
    for process in processes:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        total_kib += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    for process in processes:
        process.communicate()
    return total_kib / 2**20


def main() -> None:
    """Compare one rank with two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        read_share(arguments.folder, arguments.rank, arguments.ranks)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_arrays(Path(folder), arguments.gib)
        one, two = (resident_gib(Path(folder), ranks) for ranks in (1, 2))
    added = 100 * (two / one - 1)
    print(f"{arguments.gib:g} GiB of images: one rank {one:.2f} GiB, two ranks {two:.2f} GiB: {added:+.1f} %")


if __name__ == "__main__":
    main()
