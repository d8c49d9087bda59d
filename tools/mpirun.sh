#!/usr/bin/env bash
# Runs mpirun from .venv or the system with options for ranks on one machine:  tools/mpirun.sh RANKS COMMAND ...
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: tools/mpirun.sh RANKS COMMAND ..." >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"

ranks=$1
shift
# Without --bind-to none, a rank and its helper threads would share one core. Without --oversubscribe, Open MPI counts
# cores as slots, and a machine with two hardware threads may have only one core.
options=(-np "$ranks" --bind-to none --oversubscribe)
[ "$(id -u)" = 0 ] && export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec mpirun "${options[@]}" "$@"
