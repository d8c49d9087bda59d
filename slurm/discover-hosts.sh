#!/usr/bin/env bash
# Prints a line HOST:SLOTS for each host that a run may currently use:
#
#   horovodrun --min-np 1 --host-discovery-script slurm/discover-hosts.sh ...
#
# The hosts are those of the Slurm allocation, or the lines (HOST or HOST:SLOTS) of a file. The plan of the run gives the
# number of ranks of the current phase; the other hosts are not printed until the batch has grown.
#
# HVD_BATCHGROW_RUN=runs/NAME       the run; without it, all hosts may be used
# HVD_BATCHGROW_FIRST_RANKS=1       ranks until the run has a plan; -np and --min-np must not exceed them
# HVD_BATCHGROW_HOSTS_FILE=...      the hosts, outside an allocation; replace it atomically (mv), at any time
# HVD_BATCHGROW_SLOTS=4             ranks of a host that is listed without slots (default: the allocation's, or 1)
set -euo pipefail

die() { printf 'discover-hosts.sh: %s\n' "$*" >&2; exit 1; }

list_hosts() {
    if [ -n "${HVD_BATCHGROW_HOSTS_FILE:-}" ]; then
        sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$HVD_BATCHGROW_HOSTS_FILE"
    elif [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        scontrol show hostnames "$SLURM_JOB_NODELIST"
    else
        die "no hosts: set HVD_BATCHGROW_HOSTS_FILE, or run it in a Slurm allocation"
    fi
}

# Prints the ranks of the phase that follows the newest checkpoint; without checkpoints, those of the first phase.
ranks_now() {
    python3 - "$1" <<'PYTHON'
import json, pathlib, re, sys

run = pathlib.Path(sys.argv[1])
counters = (re.fullmatch(r"samples-(\d+)\.pt", path.name) for path in run.glob("checkpoints/samples-*.pt"))
samples = max((int(found[1]) for found in counters if found), default=0)
phases = [phase for phase in json.loads((run / "plan.json").read_text())["phases"] if phase["num_updates"]]
print([phase for phase in phases if phase["start_samples"] <= samples][-1]["ranks"])
PYTHON
}

hosts=$(list_hosts) || exit 1
left=''
if [ -n "${HVD_BATCHGROW_RUN:-}" ]; then
    # Without a plan, print only a few: ranks that the first phase does not need would be dropped after a second.
    left=${HVD_BATCHGROW_FIRST_RANKS:-1}
    [[ $left =~ ^[1-9][0-9]*$ ]] || die "HVD_BATCHGROW_FIRST_RANKS must be a number of ranks, 1 or more, got '$left'"
    if [ -e "$HVD_BATCHGROW_RUN/plan.json" ]; then left=$(ranks_now "$HVD_BATCHGROW_RUN"); fi
fi
default_slots=${HVD_BATCHGROW_SLOTS:-${SLURM_NTASKS_PER_NODE:-1}}

while read -r line; do
    [ -n "$line" ] || continue
    host=${line%%:*} slots=$default_slots
    [ "$host" = "$line" ] || slots=${line#*:}
    [[ $slots =~ ^[1-9][0-9]*$ ]] || die "slots must be a number, got '$line'"
    if [ -n "$left" ]; then
        [ "$left" -gt 0 ] || break
        [ "$slots" -le "$left" ] || slots=$left
        left=$((left - slots))
    fi
    printf '%s:%s\n' "$host" "$slots"
done <<<"$hosts"
