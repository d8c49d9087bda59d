"""Checkpoints of a run: writing, finding, checking."""
