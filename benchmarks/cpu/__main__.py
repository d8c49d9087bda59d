"""Compare this package on CPUs with the alternatives that users have, on one machine, in turns.

    make bench                                          all rows, at most 40 minutes
    python -m benchmarks.cpu --rows loop ranks          only these
    python -m benchmarks.cpu --tiny                     tiny sizes: shows that the rows work

Each row is a process with a time budget. Contestants alternate (A B A B …), and the table shows the median of the
ratios of the same turn, with the least and the most. The table is printed. All values are written to a dated JSON file,
which also has the machine, the versions and the load. A ratio that is more than 5 % worse than in the last file of
the same machine is printed in red. Exit code: 0 if no row failed, otherwise 1.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.cpu.rows import ROWS, TOTAL_S
from benchmarks.rows.check import Benchmark, run_all


def main() -> int:
    """Run the rows, print the table and write the file; return the exit code."""
    benchmark = Benchmark("bench", "benchmarks.cpu.rows", ROWS, TOTAL_S)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny networks and sizes")
    benchmark.add_options(parser)
    options = parser.parse_args()
    return run_all(benchmark, options, "cpu", is_tiny=options.tiny)


if __name__ == "__main__":
    sys.exit(main())
