"""Which launcher has started this process."""

from __future__ import annotations

from collections.abc import Mapping

GLOO, OPEN_MPI, OTHER_MPI = "horovodrun --gloo", "mpirun", "an MPI launcher"

_SIZE_VARIABLES = {
    OPEN_MPI: "OMPI_COMM_WORLD_SIZE",
    OTHER_MPI: "PMI_SIZE",
    # Last: mpirun under horovodrun --mpi sets its own as well.
    GLOO: "HOROVOD_SIZE",
}
"""Where each launcher tells a process how many it has started."""


def launched_by(environment: Mapping[str, str]) -> str | None:
    """The launcher that started this process; None: it was started by hand, alone."""
    for launcher, variable in _SIZE_VARIABLES.items():
        if environment.get(variable, "").isdigit():
            return launcher
    return None


def launched_ranks(environment: Mapping[str, str]) -> int:
    """How many ranks the launcher has started; 1 without one."""
    launcher = launched_by(environment)
    return int(environment[_SIZE_VARIABLES[launcher]]) if launcher else 1
