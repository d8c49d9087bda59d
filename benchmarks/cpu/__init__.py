"""Compare this package on CPUs with the alternatives that users have: `python -m benchmarks.cpu`."""
