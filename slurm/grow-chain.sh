#!/usr/bin/env bash
# Submits a chain from a login node without Python. `hvd-batchgrow submit` instead computes the chain jobs from the plan
# and keeps a ledger.
#
#   slurm/grow-chain.sh [--dry-run] JOB NODES:PHASES ... [-- OPTIONS of hvd-batchgrow train]
#   slurm/grow-chain.sh job.toml 1:1-1 2:2-2 4:3-4 -- --layout.grow_by ranks --layout.ranks_per_phase '[1,2,4,4]'
#
# TEMPLATE=...          the batch script (default: train.sbatch beside this file)
# RANKS_PER_NODE=1      ranks per node, for every chain job
# SBATCH_PARTITION=...  and other SBATCH_ variables are read by sbatch
set -euo pipefail

die() { printf 'grow-chain.sh: %s\n' "$@" >&2; exit 2; }
usage='usage: slurm/grow-chain.sh [--dry-run] JOB NODES:PHASES ... [-- OPTIONS of hvd-batchgrow train]'

dry=''
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ $# -ge 2 ] || die "$usage"
job=$1
shift
chain_jobs=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [[ $1 =~ ^[1-9][0-9]*:[1-9][0-9]*-[1-9][0-9]*$ ]] ||
        die "a chain job must be NODES:FIRST-LAST such as 2:2-3, got '$1'" "$usage"
    chain_jobs+=("$1")
    shift
done
[ ${#chain_jobs[@]} -gt 0 ] || die "$usage"
if [ $# -gt 0 ]; then shift; fi
options=("$@")

ranks=${RANKS_PER_NODE:-1}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "RANKS_PER_NODE must be a whole number, 1 or more, got '$ranks'"
template=${TEMPLATE:-$(dirname "${BASH_SOURCE[0]}")/train.sbatch}
[ -r "$template" ] || die "$template cannot be read: set TEMPLATE=..."
[ -r "$job" ] || die "$job cannot be read"
[ -n "$dry" ] || command -v sbatch >/dev/null || die "sbatch is not on PATH: is this a login node of a Slurm cluster?"

# Sets `command` to the command that submits a chain job:  make_command NODES:PHASES OPTIONS of sbatch
make_command() {
    local chain_job=$1 nodes=${1%%:*}
    shift
    command=(sbatch "$@" "--nodes=$nodes" "--ntasks-per-node=$ranks" "--ntasks=$((nodes * ranks))" "$template"
        "$job" --resume auto --phases "${chain_job#*:}" "${options[@]}")
}

for chain_job in "${chain_jobs[@]}"; do
    make_command "$chain_job" --test-only
    if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; continue; fi
    output=$("${command[@]}" 2>&1) ||
        die "sbatch --test-only refuses chain job $chain_job, and nothing is submitted: $output"
done

# If this script ends before the chain is complete, it cancels the submitted jobs. Signals take effect after sbatch.
submitted=() stopped='' complete=''
cancel_submitted() { [ -n "$complete$dry" ] || [ ${#submitted[@]} -eq 0 ] || scancel "${submitted[@]}"; }
trap cancel_submitted EXIT
trap stopped=1 INT TERM HUP PIPE

for chain_job in "${chain_jobs[@]}"; do
    wait_for=()
    if [ ${#submitted[@]} -gt 0 ]; then
        wait_for=("--dependency=afterok:${submitted[-1]}" --kill-on-invalid-dep=yes)
    fi
    make_command "$chain_job" --parsable "${wait_for[@]}"
    if [ -n "$dry" ]; then
        printf '%q ' "${command[@]}"
        echo
        submitted+=("JOB_ID_$((${#submitted[@]} + 1))")
        continue
    fi
    if ! output=$("${command[@]}"); then
        reason='is refused'
        [ -z "$stopped" ] || reason='was interrupted, and squeue --me shows whether Slurm has accepted it'
        die "chain job $chain_job $reason; cancelled the submitted jobs: ${submitted[*]:-none}"
    fi
    submitted+=("${output%%;*}")
    [ -z "$stopped" ] || die "interrupted; cancelled the submitted jobs: ${submitted[*]}"
    printf 'chain job %s: job %s\n' "$chain_job" "${submitted[-1]}"
done
complete=1
