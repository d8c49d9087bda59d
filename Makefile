.PHONY: quickstart setup test format clean

JOB := jobs/fashion_mnist_quickstart.toml

quickstart: setup  ## train the quickstart job and its decay twin on two ranks, and compare them
	tools/mpirun.sh 2 hvd-batchgrow twin $(JOB) --resume auto

setup:  ## what training needs, in .venv
	@tools/setup.sh

test:  ## set up, check and test everything
	@tools/setup.sh test
	@tools/test.sh

format:
	.venv/bin/ruff check --fix -q .
	.venv/bin/ruff format -q .

clean:  ## remove .venv; runs and caches stay
	rm -rf .venv
