"""Checks of MPI and Horovod."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from hvd_batchgrow.doctor.check import Check, Facts, fail, note, ok
from hvd_batchgrow.doctor.gather import facts_of
from hvd_batchgrow.doctor.tool import first_line, tool_facts

REBUILD = "put the mpirun and mpicc of your MPI first on PATH, then: make clean setup"
_ROOT_VARIABLES = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
_NAMES = {"open mpi": "Open MPI", "openrte": "Open MPI", "mpich": "MPICH", "hydra": "MPICH", "intel": "Intel MPI"}


def launcher_facts() -> Facts:
    """Return the mpirun on PATH, and whether this user may use it."""
    return {
        "mpirun": dict(tool_facts(["mpirun", "--version"])),
        "is_root": os.geteuid() == 0,
        "allows_root": all(os.environ.get(name) for name in _ROOT_VARIABLES),
    }


def mpi_of(text: str) -> tuple[str, str]:
    """Return the implementation of MPI and its version, from `mpirun --version` or MPI's library version.

    `Open MPI v4.1.4, package: …` gives ("Open MPI", "4.1.4"); `HYDRA build details: Version: 4.0.2` ("MPICH", "4.0.2").
    Unknown parts are empty.
    """
    lowered = text.lower()
    name = next((_NAMES[word] for word in _NAMES if word in lowered), "")
    number = re.search(r"\d+\.\d+(\.\d+)?", text)
    return name, number[0] if number else ""


def check_mpi(facts: Mapping[str, Facts]) -> Check:
    """Check that mpi4py and mpirun use the same MPI, and that this user may start ranks."""
    launcher = facts_of(facts, "launcher")
    mpirun = launcher.get("mpirun", launcher)
    if "error" not in mpirun and mpirun["path"] is None:
        remedy = "make setup, or on a cluster: module load openmpi"
        return note("MPI", "mpirun is not on PATH: several ranks need torchrun, horovodrun --gloo or srun", remedy)
    if "error" in mpirun or mpirun["code"]:
        why = mpirun.get("error") or f"{mpirun['path']} --version fails: {first_line(mpirun['output'])}"
        return fail("MPI", why, "sudo apt-get install openmpi-bin libopenmpi-dev")
    started = mpi_of(mpirun["output"])
    found = f"{' '.join(filter(None, started)) or first_line(mpirun['output'])} ({mpirun['path']})"
    check = _check_mpi4py(facts_of(facts, "mpi4py"), started, found)
    if check.status == "ok" and started[0] == "Open MPI" and launcher["is_root"] and not launcher["allows_root"]:
        variables = " ".join(f"{name}=1" for name in _ROOT_VARIABLES)
        remedy = f"export {variables}, or tools/mpirun.sh"
        return note("MPI", f"{check.found}; mpirun refuses to run as root", remedy)
    return check


def _check_mpi4py(mpi4py: Facts, started: tuple[str, str], mpirun: str) -> Check:
    """Check that mpi4py uses the MPI of mpirun.

    Args:
        mpi4py: its facts.
        started: name and version of mpirun's MPI.
        mpirun: text with name, version and path of mpirun's MPI.
    """
    if mpi4py.get("is_missing"):
        limit = "mpi4py is not installed, so under Horovod each phase must use all ranks"
        return note("MPI", f"{mpirun}; {limit}", "pip install 'hvd_batchgrow[mpi]'")
    if "error" in mpi4py:
        return fail("MPI", f"{mpirun}; mpi4py cannot be imported: {mpi4py['error']}", REBUILD)
    linked = mpi_of(mpi4py["library"])
    uses = f"mpi4py {mpi4py['version']} uses {' '.join(filter(None, linked)) or mpi4py['library']}"
    if all(started) and all(linked) and started != linked:
        where = f" ({', '.join(mpi4py['files'])})" if mpi4py["files"] else ""
        return fail("MPI", f"mpirun is {mpirun}, but {uses}{where}: each rank would train alone", REBUILD)
    return ok("MPI", f"{mpirun}, {uses}")


def check_horovod(facts: Mapping[str, Facts]) -> Check:
    """Check that Horovod can be imported, and its build."""
    horovod, mpi4py = facts_of(facts, "horovod"), facts_of(facts, "mpi4py")
    if horovod.get("is_missing"):
        instead = "not installed: ranks use torch.distributed; horovodrun and elastic jobs need Horovod"
        return note("Horovod", instead, "rm .venv/.setup-train; make setup")
    if "error" in horovod:
        return fail("Horovod", f"cannot be imported: {horovod['error']}", "rm .venv/.horovod-key; make clean setup")
    parts = {"MPI": horovod["has_mpi"], "Gloo": horovod["has_gloo"], "NCCL": horovod["nccl"]}
    missing = [name for name, is_there in parts.items() if not is_there]
    found = f"{horovod['version']}, with {', '.join(name for name in parts if name not in missing) or 'no library'}"
    found += f", without {', '.join(missing)}" if missing else ""
    if not horovod["has_mpi"] and not horovod["has_gloo"]:
        return fail("Horovod", f"{found}: it cannot connect ranks", REBUILD)
    theirs, ours = ({Path(path).resolve() for path in part.get("files", [])} for part in (horovod, mpi4py))
    if theirs and ours and theirs != ours:
        other = f"it is linked to {_paths(theirs)}, and mpi4py to {_paths(ours)}"
        return fail("Horovod", f"{found}; {other}, but a process can use only one MPI library", REBUILD)
    if not horovod["has_mpi"]:
        return note("Horovod", f"{found}: under mpirun, ranks need --backend torch", REBUILD)
    return ok("Horovod", found)


def _paths(paths: set[Path]) -> str:
    return ", ".join(sorted(map(str, paths)))
