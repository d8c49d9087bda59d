"""Where ranks meet that have neither MPI nor torchrun to tell them: from what their launcher has set."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

from hvd_batchgrow.comm.launcher_env import is_port
from hvd_batchgrow.messages.errors import RunError

_FIRST_PORT, _NUM_PORTS = 15_000, 15_000
"""Below the ports that Linux gives away by itself, from 32768 on."""

_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_JOB_NAMES = ("PMIX_NAMESPACE", "HOROVOD_GLOO_RENDEZVOUS_PORT", "PMI_ID")


def meeting_point(environment: Mapping[str, str], size: int) -> tuple[str, int]:
    """Host and port at which rank 0 listens; the same on all ranks, without a word between them.

    In this order: MASTER_ADDR and MASTER_PORT; this host, if all ranks are on it; the first host of
    SLURM's node list. A port that is not given is derived from the job's and step's names.

    Args:
        environment: of this process.
        size: how many ranks there are.

    Raises:
        RunError: none of these is known, or a variable is no port.
    """
    host = environment.get("MASTER_ADDR") or _host(environment, size)
    given = environment.get("MASTER_PORT", "")
    if given and not is_port(given):
        raise RunError(f"MASTER_PORT must be a port, 1 to 65535, got {given!r}")
    name = _job_name(environment)
    if host is None or not (given or name):
        raise RunError(
            f"the {size} ranks do not know where to meet: mpi4py cannot be used here, and neither a node list of SLURM "
            "nor a launcher tells.\n"
            "  Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, the same for all ranks"
        )
    return host, int(given) if given else derived_port(name)


def derived_port(name: str) -> int:
    """The same port for the same name; two jobs of one host seldom have the same."""
    return _FIRST_PORT + zlib.crc32(name.encode()) % _NUM_PORTS


def first_host(node_list: str) -> str:
    """The first of SLURM's node list: `gpu[003-010,12]-ib,login` begins with gpu003-ib."""
    match = re.match(r"([^,\[]*)(?:\[([^],-]+)[^]]*\])?([^,\[]*)", node_list.strip())
    return "".join(part or "" for part in match.groups()) if match else ""


def _host(environment: Mapping[str, str], size: int) -> str | None:
    # The step's list, not the job's: a step may start on another node than the job.
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if any(environment.get(variable) == str(size) for variable in _LOCAL_SIZES):
        return "127.0.0.1"
    if environment.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    return first_host(nodes) if nodes else None


def _job_name(environment: Mapping[str, str]) -> str:
    if job := environment.get("SLURM_JOB_ID"):
        # Under mpirun there may be several of them in one step.
        return ".".join([job, environment.get("SLURM_STEP_ID", ""), environment.get("PMIX_NAMESPACE", "")])
    return next((environment[name] for name in _JOB_NAMES if environment.get(name)), "")
