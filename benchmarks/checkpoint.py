"""What training waits for a checkpoint of ResNet-50's size, written in the background and at once.

python -m benchmarks.checkpoint [--turns 5] [--samples 8] [--folder DIR]

Each turn does a few updates of the same network without a checkpoint, with one in the background
after the first update, and with one that is written before training goes on. Two figures: how long
the call that saves takes, and how much longer the updates take altogether, with what the thread
that writes takes away from those that train.
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

from hvd_batchgrow.nn.torchvision_shim import import_torchvision
from hvd_batchgrow.train.checkpoint import Checkpoint, write_checkpoint
from hvd_batchgrow.train.checkpoint_writer import CheckpointWriter

KINDS = ("none", "background", "at once")
UPDATES = 3


class Bench:
    """A network with momentum, and its checkpoints.

    Args:
        folder: for them.
        num_samples: of an update, 224 × 224 each.
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
        """Forward, backward, step."""
        self.optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()

    def capture(self) -> Checkpoint:
        """As the trainer's."""
        return Checkpoint(1, {}, self.model.state_dict(), self.optimizer.state_dict(), 0.0, {}, {}, {}, 0)

    def turn(self, kind: str) -> tuple[float, float]:
        """Some updates with one checkpoint after the first: seconds of the call that saves, and of all of it."""
        save: dict[str, Callable[[], object]] = {
            "none": lambda: None,
            "background": lambda: self.writer.save(self.capture()),
            "at once": lambda: write_checkpoint(self.folder, self.capture(), 1, ()),
        }
        begin = time.perf_counter()
        for index in range(UPDATES):
            self.update()
            if index == 0:
                start = time.perf_counter()
                save[kind]()
                waited_s = time.perf_counter() - start
        total_s = time.perf_counter() - begin
        self.writer.wait()
        return waited_s, total_s


def spread(values: list[float], scale: float = 1.0) -> str:
    """Median, least and most."""
    low, middle, high = (scale * pick(values) for pick in (min, statistics.median, max))
    return f"{middle:9.3f} ({low:.3f} … {high:.3f})"


def main() -> None:
    """Take turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(Path(folder), arguments.samples)
        bench.turn("background")  # its memory is there from now on
        turns = [
            {kind: bench.turn(kind) for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]}
            for turn in range(arguments.turns)
        ]
    update_s = [turn["none"][1] / UPDATES for turn in turns]
    print(f"{bench.num_parameters:,} parameters with momentum, {torch.get_num_threads()} threads")
    print(f"an update of {arguments.samples} samples: {spread(update_s)} s")
    for kind in KINDS[1:]:
        waited = [turn[kind][0] for turn in turns]
        more = [turn[kind][1] - turn["none"][1] for turn in turns]
        share = [100 * w / u for w, u in zip(waited, update_s, strict=True)]
        print(f"{kind:12} the call {spread(waited)} s = {spread(share)} % of an update; all of it {spread(more)} s")


if __name__ == "__main__":
    main()
