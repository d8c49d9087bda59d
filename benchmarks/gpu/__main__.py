"""Check and measure this package on a machine with a GPU, within 8 minutes and without a network.

    make gpu-check                                          all rows
    python -m benchmarks.gpu --rows ghost_norm wrn          only these
    python -m benchmarks.gpu --device cpu                   tiny sizes on a CPU: shows that the rows work

Each row is a process with a time budget. A row whose packages, GPU or time are missing is skipped with the reason.
The table is printed, and written with all values of all turns to a dated JSON file, which also has the versions of
driver, CUDA, torch and packages. Exit code: 0 if no row failed, otherwise 1.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.gpu.rows import ROWS, TOTAL_S
from benchmarks.rows.check import Benchmark, run_all


def main() -> int:
    """Run the rows, print the table and write the file; return the exit code."""
    benchmark = Benchmark("gpu-check", "benchmarks.gpu.rows", ROWS, TOTAL_S, ("torch", "triton"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes (default: cuda)")
    benchmark.add_options(parser)
    options = parser.parse_args()
    return run_all(benchmark, options, options.device, is_tiny=options.device == "cpu")


if __name__ == "__main__":
    sys.exit(main())
