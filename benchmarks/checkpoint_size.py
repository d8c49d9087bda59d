"""Measure seconds and memory of saving and resuming a large network with momentum, on rank 0.

python -m benchmarks.checkpoint_size [--millions 62.5 125 250] [--turns 3] [--folder DIR]

Each size is measured in a separate process, which needs about 24 bytes of memory per parameter. The tensors have 4
million parameters each. "Peak" is the process's largest memory during a step, in addition to weights and optimizer.
The broadcast goes to a second rank that is not there: its time is rank 0's own work without a network.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.checkpoint import checkpoint_of
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, broadcast_checkpoint, newest_good, write_checkpoint
from hvd_batchgrow.train.checkpoints.writer import HostCopies, host_copy
from hvd_batchgrow.train.weights_agree import check_agreement

T = TypeVar("T")
PER_TENSOR = 1 << 22


class Pair(SingleRank):
    """Rank 0 of two; the other one is not there and has the same weights."""

    size = 2

    def all_equal(self, number: int, name: str) -> bool:
        """Return True."""
        return True


class Meter:
    """Times steps, and measures their memory."""

    def __init__(self) -> None:
        self.base = _memory("VmRSS")
        self.found: dict[str, tuple[float, float]] = {}

    def measure(self, name: str, step: Callable[[], T]) -> T:
        """Call a step, and note its seconds and its peak in bytes."""
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        begin = time.perf_counter()
        result = step()
        self.found[name] = time.perf_counter() - begin, _memory("VmHWM") - self.base
        return result


def _memory(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * float(found[1])


class Bench:
    """A network with momentum on one thread.

    Args:
        num_parameters: of the network.
        folder: of the checkpoints.
    """

    def __init__(self, num_parameters: int, folder: Path) -> None:
        torch.set_num_threads(1)
        whole, rest = divmod(num_parameters, PER_TENSOR)
        sizes = [PER_TENSOR] * whole + [rest] * (rest > 0)
        self.folder, self.ranks = folder, Pair()
        self.model = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        for parameter in self.model:
            self.optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
        self.meter = Meter()

    def capture(self) -> Checkpoint:
        """Return a checkpoint like the trainer's."""
        return checkpoint_of(self.model, self.optimizer)

    def save(self) -> int:
        """Measure what saving takes; return the bytes of the file."""
        copies, measure = HostCopies(), self.meter.measure
        measure("compare weights", lambda: check_agreement(self.model, self.ranks, 1))
        measure("first copy", lambda: host_copy(self.capture(), copies))
        copied = measure("later copy", lambda: host_copy(self.capture(), copies))
        path = measure("write", lambda: write_checkpoint(self.folder, copied, 1, ()))
        return path.stat().st_size

    def resume(self) -> None:
        """Measure what resuming takes."""
        checkpoint = self.meter.measure("read", lambda: newest_good(self.folder)[0])
        received = self.meter.measure("broadcast", lambda: broadcast_checkpoint(self.ranks, checkpoint))
        assert received is not None
        self.meter.measure("load", lambda: self.load(received))

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)


def child(num_parameters: int, folder: Path) -> dict[str, Any]:
    """Measure one size in this process."""
    bench = Bench(num_parameters, folder)
    num_bytes = bench.save()
    bench.resume()
    return {"bytes": num_bytes, "steps": bench.meter.found}


def main() -> None:
    """Measure each size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[62.5, 125, 250])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.folder)))
        return
    runs: dict[float, list[dict[str, Any]]] = {millions: [] for millions in arguments.millions}
    for _ in range(arguments.turns):
        for millions, found in runs.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                command = [sys.executable, "-m", "benchmarks.checkpoint_size", "--child", str(int(1e6 * millions))]
                checkpoints = Path(folder) / "checkpoints"
                checkpoints.mkdir()
                command += ["--folder", str(checkpoints)]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    for millions, found in runs.items():
        print(f"{millions:g} million parameters with momentum, a file of {found[0]['bytes'] / 1e9:.3f} GB")
        for step in found[0]["steps"]:
            seconds, peaks = zip(*(run["steps"][step] for run in found), strict=True)
            spread = f"{statistics.median(seconds):8.2f} s ({min(seconds):.2f} … {max(seconds):.2f})"
            print(f"  {step:16} {spread}, peak {max(peaks) / 1e9:6.2f} GB")


if __name__ == "__main__":
    main()
