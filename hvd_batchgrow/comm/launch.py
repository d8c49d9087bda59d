"""Which launcher has started this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Comm = Literal["auto", "horovod", "torch"]
"""What ranks talk through; auto: Horovod where it can be imported, else torch.distributed, as under torchrun."""

TORCHRUN, GLOO, OPEN_MPI = "torchrun", "horovodrun --gloo", "mpirun"
SRUN_PMIX, OTHER_MPI = "srun --mpi=pmix", "an MPI launcher"
OF_MPI = (OPEN_MPI, SRUN_PMIX, OTHER_MPI)
"""Launchers whose ranks can talk through MPI."""

_VARIABLES: dict[str, tuple[str, ...]] = {
    # First: srun and mpirun start torchrun, never the other way round. RANK alone is set by many a batch script.
    TORCHRUN: ("WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT"),
    OPEN_MPI: ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    SRUN_PMIX: ("SLURM_STEP_NUM_TASKS", "PMIX_RANK"),
    OTHER_MPI: ("PMI_SIZE", "PMI_RANK"),
    # Last: mpirun under horovodrun --mpi sets its own as well.
    GLOO: ("HOROVOD_SIZE", "HOROVOD_RANK"),
}
"""Where each launcher tells a process how many it has started, and which of them this one is."""

OF_LAUNCHERS = (
    *("OMPI_COMM_WORLD_", "PMIX_", "PMI_", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_", "HOROVOD_CROSS_"),
    *("TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
"""How the variables begin that would make a child take itself for one of its parent's ranks."""


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
    size, rank, *_ = _VARIABLES[launcher]
    return int(environment[rank]), int(environment[size])
