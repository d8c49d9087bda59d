.PHONY: quickstart setup check test test-long coverage storm fuzz bench paper paper-quick gpu-check format clean help

JOB := jobs/fashion_mnist_quickstart.toml

quickstart: setup  ## set up, then train the quickstart job and its decay twin on two ranks and compare them (about 10 minutes)
	tools/mpirun.sh 2 hvd-batchgrow twin $(JOB) --resume auto

setup:  ## install what training needs into .venv
	@tools/setup.sh

check:  ## format, lint, types, shell and the fast unit tests: under two minutes; without slow, mpi, slurm and gpu tests
	@tools/setup.sh test
	@tools/check.sh tests

test:  ## install what the tests need and run all checks and tests
	@tools/setup.sh test
	@tools/test.sh

test-long:  ## run the long tests that CI does not run (about 5 minutes)
	@tools/setup.sh test
	PATH="$$PWD/.venv/bin:$$PATH" OMP_NUM_THREADS=1 OMPI_MCA_mpi_yield_when_idle=1 \
	    python -m pytest -q -m long -n auto --maxprocesses 4 --dist loadfile tests/launch tests/unit

coverage:  ## make test with line coverage: 25 to 50 % slower
	@tools/setup.sh test
	@HVD_BATCHGROW_COVERAGE=1 tools/test.sh

storm:  ## kill a small run 200 times and check that nothing is lost (20 to 30 minutes)
	@tools/setup.sh test
	PATH="$$PWD/.venv/bin:$$PATH" OMP_NUM_THREADS=1 python -m tests.storm --kills 200

fuzz:  ## test 10 000 bad job files, command lines, data files, checkpoints and environments, and 300 networks (40 minutes)
	@tools/setup.sh test
	PATH="$$PWD/.venv/bin:$$PATH" OMP_NUM_THREADS=1 python -m tests.fuzz --cases 10000
	PATH="$$PWD/.venv/bin:$$PATH" OMP_NUM_THREADS=1 python -m tests.fuzz.networks
	OMP_NUM_THREADS=1 tools/mpirun.sh 2 python -m tests.fuzz.networks

bench:  ## compare with the alternatives that users have, on this machine's CPUs: at most 40 minutes; ARGS="--rows loop ranks"
	@tools/setup.sh
	@PATH="$$PWD/.venv/bin:$$PATH" python -m benchmarks.cpu $(ARGS)

paper:  ## train the studies of benchmarks/paper that docs/results lacks (hours; can be interrupted), and write their tables
	@tools/setup.sh
	@PATH="$$PWD/.venv/bin:$$PATH" python -m benchmarks.paper.make_tables
	@PATH="$$PWD/.venv/bin:$$PATH" python -m benchmarks.paper.make_fonts
	@PATH="$$PWD/.venv/bin:$$PATH" python -m benchmarks.paper train
	@[ -f docs/results/wall_time.json ] || PATH="$$PWD/.venv/bin:$$PATH" python -m benchmarks.paper.wall_time
	@PATH="$$PWD/.venv/bin:$$PATH" python -m benchmarks.paper write

paper-quick:  ## try what paper does in about a minute: a small study, its table and its figures, in build/paper-quick
	@tools/setup.sh
	@PATH="$$PWD/.venv/bin:$$PATH" tools/paper_quick.sh

gpu-check:  ## check and measure on a GPU, without a network: at most 8 minutes (docs/performance.md); ARGS="--rows wrn"
	@PYTHON=.venv/bin/python; [ -x $$PYTHON ] || PYTHON=python3; $$PYTHON -m benchmarks.gpu $(ARGS)

format:  ## fix lint errors, format the code, and write the tables of sources and networks into the docs
	.venv/bin/ruff check --fix -q .
	.venv/bin/ruff format -q .
	PYTHONPATH=. .venv/bin/python tools/reference_tables.py

clean:  ## remove .venv; keep runs and caches
	rm -rf .venv

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12
