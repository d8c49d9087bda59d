"""Measure passes/s of a small network, with freed memory returned to the system and with freed memory kept.

python -m benchmarks.memory [--turns 5]

A process cannot undo the setting, so each turn starts a process of each kind.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks.turns import print_rates

KINDS = ("given back", "kept")
PASSES, WARM_PASSES, SAMPLES = 15, 3, 256


def time_passes() -> float:
    """Return the median seconds of a forward and backward pass over 256 Fashion-MNIST-sized samples on one thread."""
    import torch

    from hvd_batchgrow.nn.networks import small_conv_net

    torch.set_num_threads(1)
    model = small_conv_net.build(1, 10, ghost_batch=64, bn_momentum=0.1)
    images, labels = torch.randn(SAMPLES, 1, 28, 28), torch.zeros(SAMPLES, dtype=torch.int64)
    times = []
    for _ in range(WARM_PASSES + PASSES):
        begin = time.perf_counter()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_PASSES:])


def child(*, keep: bool) -> None:
    """Print the seconds of a pass in this process, which is of one kind."""
    from hvd_batchgrow.train.malloc_tuning import keep_freed_memory

    if keep and not keep_freed_memory({}):
        raise SystemExit("this C library has no setting to keep freed memory")
    print(time_passes())


def measured(kind: str) -> float:
    """Return the seconds of a pass in a separate process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Run the turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(keep=arguments.child == "kept")
        return
    # Each process times itself, without its start.
    turns = [{kind: 1 / measured(kind) for kind in KINDS} for _ in range(arguments.turns)]
    print_rates({kind: [turn[kind] for turn in turns] for kind in KINDS}, "passes/s", KINDS[0])


if __name__ == "__main__":
    main()
