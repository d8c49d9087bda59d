#!/usr/bin/env bash
# Runs all checks and tests. Ends at the first failure, and if a step selects no tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
[ "$(id -u)" = 0 ] && export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# Each pytest process has its own temporary folder: two that clean up a shared one find partly removed entries.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Every pytest below, including the ranks of tests/parallel, appends its skipped tests to one file.
export PYTEST_PLUGINS=tests.skips HVD_BATCHGROW_TEST_OUTCOMES=$scratch/outcomes PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "format, lint, types, shell"
tools/check.sh

step "tests in one process"
timeout 1800 pytest -q -n auto --maxprocesses 4 --dist loadfile --basetemp "$scratch/unit" tests/unit

step "tests/gpu, and the kernels in Triton's interpreter"
if python -c 'import triton' 2>/dev/null; then
    TRITON_INTERPRET=1 pytest -q --basetemp "$scratch/interpreted" tests/gpu
    pytest -q --basetemp "$scratch/gpu" tests/gpu
else
    # The tests do not require it, because it takes 640 MB on disk.
    reason="Triton is not installed (it comes with PyTorch's CUDA builds; pip install triton)"
    echo "skipped: $reason"
    printf '["tests/gpu (a folder)", "%s"]\n' "$reason" >>"$HVD_BATCHGROW_TEST_OUTCOMES"
fi

step "tests/parallel on one rank"
pytest -q --basetemp "$scratch/one" tests/parallel

# Run the same files again as ranks. The timeouts keep a rank that hangs from blocking the test run.
# shellcheck disable=SC2016  # expanded by each rank
as_rank='exec python -m pytest -q --color=no -p no:cacheprovider \
    --basetemp "$0.${RANK:-${OMPI_COMM_WORLD_RANK:-$HOROVOD_RANK}}" "$@"'
step "tests/parallel under mpirun -np 2"
HVD_BATCHGROW_TEST_RANKS=2 timeout 1200 tools/mpirun.sh 2 bash -c "$as_rank" "$scratch/mpirun" tests/parallel
step "tests/parallel under horovodrun -np 2 --gloo"
HVD_BATCHGROW_TEST_RANKS=2 timeout 1200 horovodrun -np 2 --gloo bash -c "$as_rank" "$scratch/gloo" tests/parallel
step "tests/parallel under mpirun -np 2, over torch.distributed"
HVD_BATCHGROW_TEST_COMM=torch HVD_BATCHGROW_TEST_RANKS=2 \
    timeout 1200 tools/mpirun.sh 2 bash -c "$as_rank" "$scratch/torch" tests/parallel
step "tests/parallel under torchrun"
HVD_BATCHGROW_TEST_RANKS=2 timeout 1200 torchrun --standalone --no-python --nproc-per-node 2 \
    bash -c "$as_rank" "$scratch/torchrun" tests/parallel

step "a storm of kills (make storm: the long form)"
pytest -q --basetemp "$scratch/storm" tests/storm
step "launch forms"
pytest -q -n 2 --dist loadfile --basetemp "$scratch/launch" tests/launch
step "a real Slurm of four virtual hosts"
timeout 1500 pytest -q -rs tests/slurm
step "all passed, $(python -m tests.skips "$HVD_BATCHGROW_TEST_OUTCOMES")"
