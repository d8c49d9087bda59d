#!/usr/bin/env bash
# Checks and tests everything; any failure, and any selection of no tests, ends it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
[ "$(id -u)" = 0 ] && export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "format, lint, types, shell"
ruff format --check -q .
ruff check -q .
mypy
git ls-files '*.sh' .ci/run slurm | xargs shellcheck

step "tests in one process"
pytest -q tests/unit

# The same files again, as ranks. A rank that hangs must not hang the suite.
step "tests/parallel on one rank"
pytest -q tests/parallel
step "tests/parallel under mpirun -np 2"
HVD_BATCHGROW_TEST_RANKS=2 timeout 600 tools/mpirun.sh 2 python -m pytest -q --color=no -p no:cacheprovider tests/parallel
step "tests/parallel under horovodrun -np 2 --gloo"
HVD_BATCHGROW_TEST_RANKS=2 timeout 600 horovodrun -np 2 --gloo python -m pytest -q -p no:cacheprovider tests/parallel

step "launch forms"
pytest -q tests/launch
step "all passed"
