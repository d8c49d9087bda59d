"""Checks of finished runs: the order of their samples, their weights, and equality of all layouts."""
