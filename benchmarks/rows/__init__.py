"""Benchmarks of several rows: each is a process with a time budget, and a part of one table and one dated file."""
