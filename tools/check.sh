#!/usr/bin/env bash
# Checks format, lint, types, wording and shell scripts; any failure ends it.
#
#   tools/check.sh          these five
#   tools/check.sh tests    and then the fast unit tests: tests/unit without those marked slow
#
# It leaves out the slow unit tests, and all of tests/parallel, tests/launch, tests/slurm, tests/gpu, tests/emulated and
# tests/storm: tools/test.sh runs everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

[ "$(id -u)" = 0 ] && export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
case ${1:-} in
    '' | tests) ;;
    *) echo "usage: tools/check.sh [tests]" >&2; exit 2 ;;
esac

ruff format --check -q .
ruff check -q .
mypy
python tools/plain_words.py
git ls-files '*.sh' '*.sbatch' .ci/run | xargs shellcheck

[ "${1:-}" = tests ] || exit 0
# Keep compiled files, also where the environment says otherwise: pytest takes 8 s per process to compile the tests.
export PYTHONDONTWRITEBYTECODE=
# One thread per worker. Each run cleans up in its own folder.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
scratch=$(tools/scratch.sh)
trap 'rm -rf "$scratch"' EXIT
pytest -q -m "not slow" -n auto --maxprocesses 4 --dist loadfile --basetemp "$scratch/unit" tests/unit
