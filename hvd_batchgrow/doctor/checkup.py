"""All checks of a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from hvd_batchgrow.doctor.check import Check, Facts, fail
from hvd_batchgrow.doctor.folder_checks import check_folder, folder_facts
from hvd_batchgrow.doctor.gather import error_text, gather
from hvd_batchgrow.doctor.import_process import imported_facts
from hvd_batchgrow.doctor.machine_checks import (
    SHARED_MEMORY,
    check_cores,
    check_memory,
    check_shared_memory,
    machine_facts,
    shared_memory_facts,
)
from hvd_batchgrow.doctor.mpi_checks import check_horovod, check_mpi, launcher_facts
from hvd_batchgrow.doctor.python_checks import (
    check_extras,
    check_ghost_norms,
    check_package,
    check_python,
    package_facts,
    python_facts,
)
from hvd_batchgrow.doctor.slurm_check import check_slurm, slurm_facts
from hvd_batchgrow.doctor.torch_checks import check_dali, check_gpus, check_nccl, check_torch, driver_facts

IMPORT_TIMEOUT_S = 120.0
"""Time for one batch of imports; from a cold network file system they take half a minute."""

CheckFunction = Callable[[Mapping[str, Facts]], Check | list[Check]]

CHECKS: dict[str, CheckFunction] = {
    "Python": check_python,
    "hvd_batchgrow": check_package,
    "torch": check_torch,
    "ghost norms": check_ghost_norms,
    "GPUs": check_gpus,
    "NCCL": check_nccl,
    "MPI": check_mpi,
    "Horovod": check_horovod,
    "DALI": check_dali,
    "CPU": check_cores,
    "memory": check_memory,
    SHARED_MEMORY: check_shared_memory,
    "runs folder": partial(check_folder, part="runs", name="runs folder", option="--runs-dir"),
    "cache folder": partial(check_folder, part="cache", name="cache folder", option="HVD_BATCHGROW_CACHE=…"),
    "Slurm": check_slurm,
    "extras": check_extras,
}
"""The checks by name, in the order of the report."""


def machine_checks(runs_dir: Path) -> list[Check]:
    """Check this machine.

    Args:
        runs_dir: the folder of run folders.
    """
    from hvd_batchgrow.data.datasets.cache import cache_folder  # needs numpy

    # Two processes, so that Horovod and mpi4py each load their own MPI library.
    batches = {"imports": ("torch", "ghost_norms", "horovod"), "more imports": ("mpi4py", "dali")}
    parts: dict[str, Callable[[], Facts]] = {
        **{name: partial(imported_facts, batch, IMPORT_TIMEOUT_S) for name, batch in batches.items()},
        "python": python_facts,
        "package": package_facts,
        "driver": driver_facts,
        "launcher": launcher_facts,
        "slurm": slurm_facts,
        "machine": machine_facts,
        "shared_memory": shared_memory_facts,
        "runs": partial(folder_facts, runs_dir),
        "cache": lambda: folder_facts(cache_folder()),
    }
    found = gather(parts, IMPORT_TIMEOUT_S + 5)
    for name, batch in batches.items():
        imported = found.pop(name)
        found |= {part: imported.get(part, imported) for part in batch}
    return judge(found)


def judge(facts: Mapping[str, Facts], checks: Mapping[str, CheckFunction] = CHECKS) -> list[Check]:
    """Return the verdicts of all checks. A check that raises an exception fails, and affects no other."""
    verdicts: list[Check] = []
    for name, check in checks.items():
        try:
            verdict = check(facts)
        except Exception as error:  # for example, facts in an unexpected form
            verdict = fail(name, f"this check could not run: {_reason(facts, error)}")
        verdicts += [verdict] if isinstance(verdict, Check) else verdict
    return verdicts


def _reason(facts: Mapping[str, Facts], error: Exception) -> str:
    """Return the exception of a check, and the errors among the facts, which probably caused it."""
    errors = [f"{part}: {found['error']}" for part, found in facts.items() if "error" in found]
    return "; ".join([error_text(error), *errors])


def has_failed(checks: Sequence[Check]) -> bool:
    """Return whether any check failed."""
    return any(check.status == "fail" for check in checks)
