"""The launcher that has started this process, as its environment variables show."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import PurePath
from typing import Literal

from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.messages.wording import shown

Backend = Literal["auto", "horovod", "torch"]
"""Library for collectives; "auto" as in `connect`."""

TORCHRUN, GLOO, OPEN_MPI, OTHER_MPI = "torchrun", "horovodrun --gloo", "mpirun", "an MPI launcher"
SRUN_PMIX = "srun --mpi=pmix"
MPI_LAUNCHERS = (OPEN_MPI, SRUN_PMIX, OTHER_MPI)
"""Launchers whose ranks can use MPI."""

_VARIABLES: dict[str, tuple[str, ...]] = {
    # First, because srun and mpirun start torchrun, never the reverse. RANK alone does not show it: many batch scripts
    # set RANK.
    TORCHRUN: ("WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT"),
    OPEN_MPI: ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    # hydra (MPICH, Intel MPI), and srun --mpi=pmi2. Before PMIx: in an allocation, hydra starts one proxy per node by
    # srun, and its ranks inherit the number of proxies in SLURM_STEP_NUM_TASKS and the proxy's PMIX_RANK.
    OTHER_MPI: ("PMI_SIZE", "PMI_RANK"),
    SRUN_PMIX: ("SLURM_STEP_NUM_TASKS", "PMIX_RANK"),
    # Last, because mpirun under horovodrun --mpi sets its own variables too.
    GLOO: ("HOROVOD_SIZE", "HOROVOD_RANK"),
}
"""The variables in which each launcher sets the number of ranks and the rank of the process."""

LAUNCHER_PREFIXES = (
    *("OMPI_COMM_WORLD_", "PMIX_", "PMI_", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_", "HOROVOD_CROSS_"),
    *("TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
"""Prefixes of variables that a child must not inherit: they would make it one of its parent's ranks."""

_MPIRUN_PREFIXES = ("OMPI_UNIVERSE_SIZE", "OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix")
"""Prefixes of the variables by which Open MPI detects mpirun within mpirun, which it refuses."""

RELAY_S = 2.0
"""Wait between a rank's last message and the end of the job, so that the launcher forwards the message. Half a second
was too short on a machine with five processes per core."""

_MOST_RANKS = 1 << 20


def environment_faults(environment: Mapping[str, str]) -> list[Fault]:
    """Return all faults of the launcher's variables.

    If a rank ignored a damaged variable, it would train the whole job alone, beside the others.
    """
    launcher = launched_by(environment)
    # A launcher sets all of its variables. RANK alone does not show a launcher: many batch scripts set it.
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
    """Return whether a variable holds a port number."""
    return _is_count(text) and 0 < int(text) < 1 << 16


def _is_count(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,7}", text) is not None and int(text) < _MOST_RANKS


def launched_by(environment: Mapping[str, str]) -> str | None:
    """Return the launcher that started this process; None if it was started without one."""
    # Under horovodrun --gloo, ranks inherit the variables of an srun step in which it was started.
    first = {GLOO: _VARIABLES[GLOO]} if environment.get("HOROVOD_CONTROLLER") == "gloo" else {}
    for launcher, variables in {**first, **_VARIABLES}.items():
        if all(_is_count(environment.get(variable, "")) for variable in variables):
            return launcher
    return None


def launched_ranks(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return this process's rank, and the number of ranks that the launcher has started; (0, 1) without one."""
    launcher = launched_by(environment)
    if launcher is None:
        return 0, 1
    size, rank, *_ = _VARIABLES[launcher]
    return int(environment[rank]), int(environment[size])


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without launcher variables, for a child that is not a rank or starts a separate job."""
    prefixes = (*LAUNCHER_PREFIXES, *_MPIRUN_PREFIXES)
    return {key: value for key, value in environment.items() if not key.startswith(prefixes)}


def unconnected_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of tasks if srun has started several without an MPI plugin, else 0.

    Each of them would train the whole job alone: they cannot reach each other.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    unconnected = launched_by(environment) is None and _is_count(tasks) and int(tasks) > 1
    return int(tasks) if unconnected else 0


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Return whether this process is the one that reports a fault which all processes of the job find alike."""
    rank, _ = launched_ranks(environment)
    # If SLURM_PROCID is damaged, every task reports the fault: better twice than never.
    task = environment.get("SLURM_PROCID", "")
    first_task = not unconnected_tasks(environment) or not _is_count(task) or int(task) == 0
    return rank == 0 and first_task


def is_elastic(environment: Mapping[str, str]) -> bool:
    """Return whether horovodrun runs this process in an elastic job, which ranks may join and leave."""
    return environment.get("HOROVOD_ELASTIC") == "1"


def restarts_ranks(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun starts all ranks again, as new processes, if ranks join, leave or fail.

    It does so with `--max-restarts` above 0. The range of `--nnodes MIN:MAX` is not visible to the ranks.
    """
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "")
    return launched_by(environment) == TORCHRUN and _is_count(restarts) and int(restarts) > 0


def torchrun_agent(environment: Mapping[str, str]) -> str:
    """Return a name of the torchrun process that has started this one; "" without torchrun, or if it has no name.

    All processes that it starts, also after a restart, get the same name; those of other torchrun processes do not.
    """
    # torchrun makes a folder when it starts, and gives its processes the paths FOLDER/attempt_K/LOCAL_RANK/error.json.
    # TORCHELASTIC_RUN_ID does not identify it: it is "none" by default, and equal for several torchrun processes.
    path = PurePath(environment.get("TORCHELASTIC_ERROR_FILE", ""))
    if launched_by(environment) != TORCHRUN or len(path.parents) < 4:
        return ""
    return f"{socket.gethostname()}:{path.parents[2]}"
