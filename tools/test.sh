#!/usr/bin/env bash
# Runs all checks and tests. Ends at the first failure, and if a step selects no tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
[ "$(id -u)" = 0 ] && export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# Each pytest process has its own temporary folder: two that clean up a shared one find partly removed entries.
scratch=$(tools/scratch.sh)
trap 'rm -rf "$scratch"' EXIT
# Every pytest below, including the ranks of tests/parallel, appends its skipped tests to one file.
export PYTEST_PLUGINS=tests.skips HVD_BATCHGROW_TEST_OUTCOMES=$scratch/outcomes PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# Measuring coverage takes a quarter to a half more time, so only `make coverage` does it.
export COVERAGE_FILE=$scratch/coverage
coverage=()
[ -z "${HVD_BATCHGROW_COVERAGE:-}" ] || coverage=(--cov hvd_batchgrow --cov-report '')
# Keep compiled files, also where the environment says otherwise: pytest takes 8 s per process to compile the tests, and
# each of some hundred other processes would compile the package.
export PYTHONDONTWRITEBYTECODE=
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # nproc does not count cores beyond these numbers
# Each process uses one thread. A rank that waits in MPI gives its core to other tests.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMPI_MCA_mpi_yield_when_idle=1

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "format, lint, types, shell"
tools/check.sh

# Tests of each part of tests/launch, tests/slurm and tests/storm often wait (a fifth of the time with one process per
# core), so all parts run side by side, in one process more than there are cores. The longest parts come first.
step "launch forms, a real Slurm on five virtual hosts, a storm of kills (make storm: the long form), tests in one process"
timeout 3000 pytest -q -m "not long" -n "$((cores + 1))" --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
    "${coverage[@]}" --basetemp "$scratch/all" \
    tests/slurm tests/launch tests/storm tests/parallel tests/unit
if [ -n "${HVD_BATCHGROW_COVERAGE:-}" ]; then
    echo "coverage: $(coverage report --format total) % of the lines of hvd_batchgrow, measured in pytest's own processes only"
fi

# Separate processes: a device that was registered stays, and torch then takes it for the machine's accelerator.
step "whole runs on an emulated accelerator"
pytest -q -n "$cores" --maxprocesses 4 --dist load --basetemp "$scratch/emulated" tests/emulated

# Alone, because a run of other tests hides the GPUs. torch.compile fails in pytest's capture of log messages.
step "tests/gpu"
pytest -q -n "$cores" --maxprocesses 4 --dist load -p no:logging --basetemp "$scratch/gpu" tests/gpu
step "the kernels in Triton's interpreter"
if python -c 'import triton' 2>/dev/null; then
    TRITON_INTERPRET=1 pytest -q -n "$cores" --maxprocesses 4 --basetemp "$scratch/interpreted" \
        tests/gpu/test_ghost_triton.py
else
    # The tests do not require it, because it takes 640 MB on disk.
    reason="Triton is not installed (it comes with PyTorch's CUDA builds; pip install triton)"
    echo "skipped: $reason"
    printf '["tests/gpu/test_ghost_triton.py (a file)", "%s"]\n' "$reason" >>"$HVD_BATCHGROW_TEST_OUTCOMES"
fi

# Run the same files again as ranks. The timeouts keep a rank that hangs from blocking the test run.
# shellcheck disable=SC2016  # expanded by each rank
as_rank='exec python -m pytest -q --color=no -p no:cacheprovider \
    --basetemp "$0.${RANK:-${OMPI_COMM_WORLD_RANK:-$HOROVOD_RANK}}" "$@"'
step "tests/parallel under mpirun -np 2"
HVD_BATCHGROW_TEST_RANKS=2 timeout 1200 tools/mpirun.sh 2 bash -c "$as_rank" "$scratch/mpirun" tests/parallel
# Other forms run what depends on the library that communicates, or on the launcher: the markers in pyproject.toml.
step "tests/parallel under horovodrun -np 2 --gloo: what depends on the library"
HVD_BATCHGROW_TEST_RANKS=2 timeout 1200 horovodrun -np 2 --gloo bash -c "$as_rank" "$scratch/gloo" -m comm tests/parallel
step "tests/parallel under mpirun -np 2, over torch.distributed: what depends on the library"
HVD_BATCHGROW_TEST_COMM=torch HVD_BATCHGROW_TEST_RANKS=2 \
    timeout 1200 tools/mpirun.sh 2 bash -c "$as_rank" "$scratch/torch" -m comm tests/parallel
step "tests/parallel under torchrun: what depends on the launcher"
HVD_BATCHGROW_TEST_RANKS=2 timeout 1200 torchrun --standalone --no-python --nproc-per-node 2 \
    bash -c "$as_rank" "$scratch/torchrun" -m launcher tests/parallel

step "make paper-quick: a small study, its table and its figures"
tools/paper_quick.sh

step "all passed, $(python -m tests.skips "$HVD_BATCHGROW_TEST_OUTCOMES")"
