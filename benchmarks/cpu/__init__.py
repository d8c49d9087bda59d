"""One command that measures this package on CPUs beside what users would pick instead: `python -m benchmarks.cpu`."""
