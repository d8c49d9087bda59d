.PHONY: quickstart setup check test storm fuzz format clean help

JOB := jobs/fashion_mnist_quickstart.toml

quickstart: setup  ## train the quickstart job and its decay twin on two ranks, and compare them
	tools/mpirun.sh 2 hvd-batchgrow twin $(JOB) --resume auto

setup:  ## what training needs, in .venv
	@tools/setup.sh

check:  ## format, lint, types, shell and the fast unit tests: two minutes; without slow, mpi, slurm and gpu tests
	@tools/setup.sh test
	@tools/check.sh tests

test:  ## set up, check and test everything
	@tools/setup.sh test
	@tools/test.sh

storm:  ## kill a small run 200 times, and see that nothing is lost: twenty to thirty minutes
	@tools/setup.sh test
	PATH="$$PWD/.venv/bin:$$PATH" OMP_NUM_THREADS=1 python -m tests.storm --kills 200

fuzz:  ## ten thousand bad job files, command lines, data files, checkpoints and environments; 300 networks: forty minutes
	@tools/setup.sh test
	PATH="$$PWD/.venv/bin:$$PATH" OMP_NUM_THREADS=1 python -m tests.fuzz --cases 10000
	PATH="$$PWD/.venv/bin:$$PATH" OMP_NUM_THREADS=1 python -m tests.fuzz.networks
	OMP_NUM_THREADS=1 tools/mpirun.sh 2 python -m tests.fuzz.networks

format:
	.venv/bin/ruff check --fix -q .
	.venv/bin/ruff format -q .

clean:  ## remove .venv; runs and caches stay
	rm -rf .venv

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12
