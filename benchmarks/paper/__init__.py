"""The studies behind the tables of results: which jobs are trained, with which seeds, and what is kept of their runs.

python -m benchmarks.paper train [STUDY …]      train what docs/results/ does not have yet; can be interrupted
python -m benchmarks.paper write                write the tables into the documentation
"""
