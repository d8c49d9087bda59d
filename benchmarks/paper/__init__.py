"""The studies behind the tables of results: which jobs are trained, with which seeds, and what is kept of their runs.

python -m benchmarks.paper train [STUDY …]      train what docs/results/ does not have yet; can be interrupted
python -m benchmarks.paper.wall_time            measure AdaBatch's schedules on 1, 2 and 4 ranks
python -m benchmarks.paper write [TABLE …]      write tables and figures into the documentation

`make paper` runs all of this, and `make paper-quick` a small study, in about a minute.

Data sets that are made on your machine, below build/data/, from packages of Debian:

python -m benchmarks.paper.make_fonts           images of 62 characters; the families for testing are unseen
python -m benchmarks.paper.make_tables          Letter Recognition and Shuttle, with the published splits

benchmarks/paper/jobs/ has their jobs. Both need apt-get and a network, and tables also need pip.
"""
