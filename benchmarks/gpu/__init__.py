"""One command that checks and measures this package on a machine with a GPU: `python -m benchmarks.gpu`."""
