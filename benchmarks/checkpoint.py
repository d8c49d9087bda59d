"""Measure how long training waits for a checkpoint of ResNet-50, written in the background or at once.

python -m benchmarks.checkpoint [--turns 5] [--samples 8] [--folder DIR]

Each turn times an update of ResNet-50, a call that writes a checkpoint in the background, and a call that
writes one before it returns. The calls are shown in seconds and as a percentage of the update.
Each turn then measures how writing affects the training thread: the longest pause of a thread that only
reads the clock, while a checkpoint is written and while no checkpoint is written. Pauses come from Python's
lock or from other processes. Last, the processor time of a checkpoint is measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hvd_batchgrow.torchvision_shim import import_torchvision
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, write_checkpoint
from hvd_batchgrow.train.checkpoints.writer import CheckpointWriter

KINDS = ("background", "at once")


class Bench:
    """A network with momentum, and its checkpoints.

    Args:
        folder: folder of the checkpoints.
        num_samples: samples of an update, 224 × 224 each.
    """

    def __init__(self, folder: Path, num_samples: int) -> None:
        import_torchvision()
        from torchvision.models import resnet50  # type: ignore[import-untyped]

        self.folder = folder
        self.model: nn.Module = resnet50()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.images, self.labels = torch.randn(num_samples, 3, 224, 224), torch.zeros(num_samples, dtype=torch.int64)
        self.writer = CheckpointWriter(folder, 1, ())
        self.update()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())

    def update(self) -> None:
        """Do an update: forward, backward, step."""
        self.optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()

    def capture(self) -> Checkpoint:
        """Return a checkpoint like the trainer's."""
        return checkpoint_of(self.model, self.optimizer)

    def updated_s(self) -> float:
        """Return the seconds of an update."""
        begin = time.perf_counter()
        self.update()
        return time.perf_counter() - begin

    def waited_s(self, kind: str) -> float:
        """Return the seconds of the call that saves; then wait until everything is written."""
        save: dict[str, Callable[[], object]] = {
            "background": lambda: self.writer.save(self.capture()),
            "at once": lambda: write_checkpoint(self.folder, self.capture(), 1, ()),
        }
        begin = time.perf_counter()
        save[kind]()
        waited_s = time.perf_counter() - begin
        self.writer.wait()
        return waited_s

    def held_up_s(self) -> tuple[float, float, float]:
        """Return the longest pause while a checkpoint is written, in equal time without one, and its processor time."""
        self.writer.save(self.capture())
        begin, cpu_begin, own_begin = time.perf_counter(), time.process_time(), time.thread_time()
        writing = longest_pause_s(lambda: self.writer._thread is not None and self.writer._thread.is_alive())
        cpu_s = time.process_time() - cpu_begin - (time.thread_time() - own_begin)
        self.writer.wait()
        end = 2 * time.perf_counter() - begin
        return writing, longest_pause_s(lambda: time.perf_counter() < end), cpu_s


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
    """Return a checkpoint like the trainer's."""
    return Checkpoint(1, {}, model.state_dict(), optimizer.state_dict(), 0.0, {}, {}, {}, 0)


def longest_pause_s(is_active: Callable[[], bool]) -> float:
    """Return the longest pause of this thread, which only reads the clock while `is_active`."""
    longest, last = 0.0, time.perf_counter()
    while is_active():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def spread(values: list[float], scale: float = 1.0) -> str:
    """Return median, least and most as text."""
    low, middle, high = (scale * pick(values) for pick in (min, statistics.median, max))
    return f"{middle:9.3f} ({low:.3f} … {high:.3f})"


def main() -> None:
    """Run the turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(Path(folder), arguments.samples)
        bench.waited_s("background")  # allocates its memory before the timed turns
        updates, waits, pauses = [], [], []
        for turn in range(arguments.turns):
            updates.append(bench.updated_s())
            waits.append({kind: bench.waited_s(kind) for kind in KINDS[:: 1 if turn % 2 else -1]})
            pauses.append(bench.held_up_s())
    print(
        f"{bench.num_parameters:,} parameters with momentum, {torch.get_num_threads()} threads; medians (least … most)"
    )
    print(f"an update of {arguments.samples} samples: {spread(updates)} s")
    for kind in KINDS:
        waited = [wait[kind] for wait in waits]
        share = [100 * wait / update for wait, update in zip(waited, updates, strict=True)]
        print(f"{kind:12} {spread(waited)} s = {spread(share)} % of an update")
    while_writing, without, cpu = ([pause[k] for pause in pauses] for k in range(3))
    print(f"longest pause of another thread: {spread(while_writing)} s while writing, {spread(without)} s without")
    print(f"processor time of a checkpoint: {spread(cpu)} s")


if __name__ == "__main__":
    main()
