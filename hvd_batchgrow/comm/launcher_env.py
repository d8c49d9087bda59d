"""Which launcher has started this process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.messages.schema_messages import shown

Backend = Literal["auto", "horovod", "torch"]
"""What ranks talk through; auto: Horovod where it can be imported, else torch.distributed, as under torchrun."""

TORCHRUN, GLOO, OPEN_MPI, OTHER_MPI = "torchrun", "horovodrun --gloo", "mpirun", "an MPI launcher"
SRUN_PMIX, SRUN_PMI2 = "srun --mpi=pmix", "srun --mpi=pmi2"
OF_MPI = (OPEN_MPI, SRUN_PMIX, SRUN_PMI2, OTHER_MPI)
"""Launchers whose ranks can talk through MPI."""

_VARIABLES: dict[str, tuple[str, ...]] = {
    # First: srun and mpirun start torchrun, never the other way round. RANK alone is set by many a batch script.
    TORCHRUN: ("WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT"),
    OPEN_MPI: ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    SRUN_PMIX: ("SLURM_STEP_NUM_TASKS", "PMIX_RANK"),
    SRUN_PMI2: ("SLURM_STEP_NUM_TASKS", "PMI_RANK"),
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

RELAY_S = 2.0
"""A launcher that is told to end the job may drop what a rank has said less than so long before; half a second was too
short on a machine with five processes a core."""

_MOST_RANKS = 1 << 20


def environment_faults(environment: Mapping[str, str]) -> list[Fault]:
    """What is wrong with the variables of the launcher that started this process: all of it.

    A rank that took a damaged variable for none would train the whole job alone, beside the others.
    """
    launcher = launched_by(environment)
    # A launcher has set all of its variables, or it is not this one: RANK alone is set by many a batch script.
    complete = [names for names in _VARIABLES.values() if all(environment.get(name) for name in names)]
    faults = {
        name: f"must be a whole number >= 0 and < {_MOST_RANKS}, got {shown(environment[name])}"
        for names in ([_VARIABLES[launcher]] if launcher else complete)
        for name in names
        if not _is_count(environment[name])
    }
    if launcher and not faults:
        size, rank, *_ = _VARIABLES[launcher]
        number, count = launched_ranks(environment)
        if not number < count:
            faults[rank] = f"must be below {size} = {count}, got {number}; nearest: {max(0, count - 1)}"
    port = environment.get("MASTER_PORT", "")
    if launcher and port and not is_port(port):
        faults["MASTER_PORT"] = f"must be a port, 1 to 65535, got {shown(port)}"
    return [Fault(name, fault) for name, fault in faults.items()]


def is_port(text: str) -> bool:
    """Whether a variable holds the number of a port."""
    return _is_count(text) and 0 < int(text) < 1 << 16


def _is_count(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,7}", text) is not None and int(text) < _MOST_RANKS


def launched_by(environment: Mapping[str, str]) -> str | None:
    """The launcher that started this process; None: it was started by hand, alone."""
    for launcher, variables in _VARIABLES.items():
        if all(_is_count(environment.get(variable, "")) for variable in variables):
            return launcher
    return None


def launched_ranks(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank, and how many ranks the launcher has started; (0, 1) without one."""
    launcher = launched_by(environment)
    if launcher is None:
        return 0, 1
    size, rank, *_ = _VARIABLES[launcher]
    return int(environment[rank]), int(environment[size])


def lone_tasks(environment: Mapping[str, str]) -> int:
    """How many tasks srun has started beside each other without telling them how to meet; 0: it is not so.

    Each would train the whole job alone. SLURM's variables say that there are others, never which rank this one is.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    alone = launched_by(environment) is None and _is_count(tasks) and int(tasks) > 1
    return int(tasks) if alone else 0


def speaks(environment: Mapping[str, str]) -> bool:
    """Whether this process is the one of its job that tells of a fault which all of them meet before they have met."""
    rank, _ = launched_ranks(environment)
    # A number that is damaged silences nobody: better twice than never.
    task = environment.get("SLURM_PROCID", "")
    first_task = not lone_tasks(environment) or not _is_count(task) or int(task) == 0
    return rank == 0 and first_task


def is_elastic(environment: Mapping[str, str]) -> bool:
    """Whether horovodrun has started this process as one that others may join or leave."""
    return environment.get("HOROVOD_ELASTIC") == "1"
