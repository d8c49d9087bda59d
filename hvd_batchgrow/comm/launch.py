"""Which launcher has started this process."""

from __future__ import annotations

from collections.abc import Mapping

GLOO, OPEN_MPI, SRUN_PMIX, OTHER_MPI = "horovodrun --gloo", "mpirun", "srun --mpi=pmix", "an MPI launcher"

_VARIABLES = {
    OPEN_MPI: ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    SRUN_PMIX: ("SLURM_STEP_NUM_TASKS", "PMIX_RANK"),
    OTHER_MPI: ("PMI_SIZE", "PMI_RANK"),
    # Last: mpirun under horovodrun --mpi sets its own as well.
    GLOO: ("HOROVOD_SIZE", "HOROVOD_RANK"),
}
"""Where each launcher tells a process how many it has started, and which of them this one is."""


def launched_by(environment: Mapping[str, str]) -> str | None:
    """The launcher that started this process; None: it was started by hand, alone."""
    for launcher, variables in _VARIABLES.items():
        if all(environment.get(variable, "").isdigit() for variable in variables):
            return launcher
    return None


def launched_ranks(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank, and how many ranks the launcher has started; (0, 1) without one."""
    launcher = launched_by(environment)
    if launcher is None:
        return 0, 1
    size, rank = _VARIABLES[launcher]
    return int(environment[rank]), int(environment[size])
