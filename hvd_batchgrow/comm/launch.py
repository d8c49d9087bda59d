"""Which launcher has started this process."""

from __future__ import annotations

from collections.abc import Mapping

GLOO, OPEN_MPI, OTHER_MPI = "horovodrun --gloo", "mpirun", "an MPI launcher"
SRUN_PMIX, SRUN_PMI2 = "srun --mpi=pmix", "srun --mpi=pmi2"

_VARIABLES = {
    OPEN_MPI: ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    SRUN_PMIX: ("SLURM_STEP_NUM_TASKS", "PMIX_RANK"),
    SRUN_PMI2: ("SLURM_STEP_NUM_TASKS", "PMI_RANK"),
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


def lone_tasks(environment: Mapping[str, str]) -> int:
    """How many tasks srun has started beside each other without telling them how to meet; 0: it is not so.

    Each would train the whole job alone. SLURM's variables say that there are others, never which rank this one is.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    alone = launched_by(environment) is None and tasks.isdigit() and int(tasks) > 1
    return int(tasks) if alone else 0


def speaks(environment: Mapping[str, str]) -> bool:
    """Whether this process is the one of its job that tells of a fault which all of them meet before they have met."""
    rank, _ = launched_ranks(environment)
    first_task = not lone_tasks(environment) or environment.get("SLURM_PROCID") == "0"
    return rank == 0 and first_task
