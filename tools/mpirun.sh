#!/usr/bin/env bash
# mpirun from .venv or the system, with what ranks on one machine need:  tools/mpirun.sh RANKS COMMAND ...
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: tools/mpirun.sh RANKS COMMAND ..." >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"

ranks=$1
shift
# Bound to one core, a rank's helper threads would take turns with it; and Open MPI counts cores as
# slots, where a machine of two hardware threads may have one.
options=(-np "$ranks" --bind-to none --oversubscribe)
[ "$(id -u)" = 0 ] && export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec mpirun "${options[@]}" "$@"
