#!/usr/bin/env bash
# Submits a chain without Python, for login nodes that have none; `hvd-batchgrow submit` works the links out itself,
# and keeps a ledger.
#
#   slurm/grow-chain.sh [--dry-run] JOB NODES:PHASES ... [-- OPTIONS of hvd-batchgrow train]
#   slurm/grow-chain.sh job.toml 1:1-1 2:2-2 4:3-4 -- --layout.grow_by ranks --layout.ranks_per_phase '[1,2,4,4]'
#
# TEMPLATE=...          the batch script (default: train.sbatch beside this file)
# RANKS_PER_NODE=1      of every link
# SBATCH_PARTITION=...  and the like are read by sbatch itself
set -euo pipefail

die() { printf 'grow-chain.sh: %s\n' "$@" >&2; exit 2; }
usage='usage: slurm/grow-chain.sh [--dry-run] JOB NODES:PHASES ... [-- OPTIONS of hvd-batchgrow train]'

dry=''
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ $# -ge 2 ] || die "$usage"
job=$1
shift
links=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [[ $1 =~ ^[1-9][0-9]*:[1-9][0-9]*-[1-9][0-9]*$ ]] || die "a link is NODES:FIRST-LAST such as 2:2-3, got '$1'" "$usage"
    links+=("$1")
    shift
done
[ ${#links[@]} -gt 0 ] || die "$usage"
if [ $# -gt 0 ]; then shift; fi
options=("$@")

ranks=${RANKS_PER_NODE:-1}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "RANKS_PER_NODE must be a whole number, 1 or more, got '$ranks'"
template=${TEMPLATE:-$(dirname "${BASH_SOURCE[0]}")/train.sbatch}
[ -r "$template" ] || die "$template cannot be read: set TEMPLATE=..."
[ -r "$job" ] || die "$job cannot be read"
[ -n "$dry" ] || command -v sbatch >/dev/null || die "sbatch is not on PATH: is this a login node of a Slurm cluster?"

# Fills `command` with the words that submit a link:  of_link NODES:PHASES OPTIONS of sbatch
of_link() {
    local link=$1
    shift
    command=(sbatch "$@" "--nodes=${link%%:*}" "--ntasks-per-node=$ranks" "$template"
        "$job" --resume auto --phases "${link#*:}" "${options[@]}")
}

for link in "${links[@]}"; do
    of_link "$link" --test-only
    if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; continue; fi
    said=$("${command[@]}" 2>&1) || die "Slurm could never run link $link, and nothing is submitted: $said"
done

# A chain that is not whole is taken back, whatever ends this script. A signal waits until sbatch has answered.
submitted=() stopped='' whole=''
take_back() { [ -n "$whole$dry" ] || [ ${#submitted[@]} -eq 0 ] || scancel "${submitted[@]}"; }
trap take_back EXIT
trap stopped=1 INT TERM HUP PIPE

for link in "${links[@]}"; do
    wait_for=()
    if [ ${#submitted[@]} -gt 0 ]; then
        wait_for=("--dependency=afterok:${submitted[-1]}" --kill-on-invalid-dep=yes)
    fi
    of_link "$link" --parsable "${wait_for[@]}"
    if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; submitted+=("JOB_OF_LINK_$((${#submitted[@]} + 1))"); continue; fi
    if ! said=$("${command[@]}"); then
        why='is refused'
        [ -z "$stopped" ] || why='was interrupted, and squeue --me tells whether Slurm has it'
        die "link $link $why; those before it are taken back: ${submitted[*]:-none}"
    fi
    submitted+=("${said%%;*}")
    [ -z "$stopped" ] || die "interrupted; what was submitted is taken back: ${submitted[*]}"
    printf 'link %s: job %s\n' "$link" "${submitted[-1]}"
done
whole=1
