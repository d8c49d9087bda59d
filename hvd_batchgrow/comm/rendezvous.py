"""Host and port at which ranks without MPI or torchrun meet, derived from the launcher's variables."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

from hvd_batchgrow.comm.launcher_env import is_port
from hvd_batchgrow.messages.errors import RunError

_FIRST_PORT, _NUM_PORTS = 15_000, 15_000
"""Below 32768, where Linux's ephemeral ports begin."""

_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_JOB_NAMES = ("PMIX_NAMESPACE", "HOROVOD_GLOO_RENDEZVOUS_PORT")


def meeting_point(environment: Mapping[str, str], size: int) -> tuple[str, int]:
    """Return the host and port at which rank 0 listens. All ranks compute the same, without communication.

    The host is MASTER_ADDR; else this host, if all ranks are on it; else the first host of SLURM's node list.
    The port is MASTER_PORT; else it is derived from the ids of the job and its step.

    Args:
        environment: of this process.
        size: how many ranks there are.

    Raises:
        RunError: the variables give no host or no port, or MASTER_PORT is not a port number.
    """
    host = environment.get("MASTER_ADDR") or _host(environment, size)
    given = environment.get("MASTER_PORT", "")
    if given and not is_port(given):
        raise RunError(f"MASTER_PORT must be a port, 1 to 65535, got {given!r}")
    name = _job_name(environment)
    if host is None or not (given or name):
        raise RunError(
            f"the {size} ranks do not know where to meet: mpi4py cannot be used here, and neither SLURM nor the "
            "launcher has set a host and a port.\n"
            "  Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, the same for all ranks"
        )
    return host, int(given) if given else derived_port(name)


def derived_port(name: str) -> int:
    """Return a port that depends on the name only; two jobs of one host rarely get the same."""
    return _FIRST_PORT + zlib.crc32(name.encode()) % _NUM_PORTS


def first_host(node_list: str) -> str:
    """Return the first host of SLURM's node list: gpu003-ib for `gpu[003-010,12]-ib,login`."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", node_list.strip())
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0]) if first else ""


def _host(environment: Mapping[str, str], size: int) -> str | None:
    # The step's list has priority: a step may start on another node than the job.
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if any(environment.get(variable) == str(size) for variable in _LOCAL_SIZES):
        return "127.0.0.1"
    if environment.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    return first_host(nodes) if nodes else None


def _job_name(environment: Mapping[str, str]) -> str:
    if job := environment.get("SLURM_JOB_ID"):
        # Under mpirun several jobs may run in one step.
        return ".".join([job, environment.get("SLURM_STEP_ID", ""), environment.get("PMIX_NAMESPACE", "")])
    return next((environment[name] for name in _JOB_NAMES if environment.get(name)), "")
