"""Checks of the CPU cores, the memory and the shared memory of this process."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from hvd_batchgrow.doctor.check import Check, Facts, note, ok
from hvd_batchgrow.doctor.gather import facts_of
from hvd_batchgrow.messages.wording import counted

SHARED_MEMORY = "/dev/shm"  # noqa: S108
LEAST_MEMORY_GIB = 2.0
LEAST_SHARED_GIB = 0.5
GIB = 2**30


def machine_facts(root: Path = Path("/")) -> Facts:
    """Return the cores and the memory that this process may use.

    Args:
        root: folder that contains proc and sys; another one in tests.
    """
    return {
        "cores": os.cpu_count() or 1,
        "usable_cores": len(os.sched_getaffinity(0)),
        "core_limit": core_limit(root),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory": _memory(root),
        "memory_limit": memory_limit(root),
    }


def shared_memory_facts(folder: Path = Path(SHARED_MEMORY)) -> Facts:
    """Return size and free space of the shared memory, in bytes."""
    usage = shutil.disk_usage(folder)
    return {"total": usage.total, "free": usage.free}


def core_limit(root: Path) -> float | None:
    """Return the number of cores that the control groups of this process allow; None without a limit."""
    limits = [
        int(quota) / int(period)
        for text in _group_files(root, "", "cpu.max")
        for quota, period in [(*text.split(), "100000")[:2]]
        if quota.isdigit()
    ]
    quotas = _group_files(root, "cpu", "cpu.cfs_quota_us")
    periods = _group_files(root, "cpu", "cpu.cfs_period_us")
    limits += [int(q) / int(p) for q, p in zip(quotas, periods, strict=False) if q.strip().isdigit()]
    return min(limits, default=None)


def memory_limit(root: Path) -> int | None:
    """Return the bytes that the control groups of this process allow; None without a limit."""
    texts = [*_group_files(root, "", "memory.max"), *_group_files(root, "memory", "memory.limit_in_bytes")]
    # In version 1, a huge number means no limit.
    return min((int(text) for text in texts if text.strip().isdigit() and int(text) < 2**60), default=None)


def _group_files(root: Path, controller: str, name: str) -> list[str]:
    """Return the contents of a file of this process's control group and of its parent groups.

    Args:
        root: folder that contains proc and sys.
        controller: of version 1, such as "cpu"; empty for version 2.
        name: of the file.
    """
    texts = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, _, group = line.partition(":")[2].partition(":")
        if controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controller
        place = Path(group.strip("/"))
        # In a container, the group's path may be that of the host: then the mount itself is the group.
        texts += [_text(mount / folder / name) for folder in (place, *place.parents)]
    return [text for text in texts if text]


def _memory(root: Path) -> dict[str, int]:
    """Return total and available memory, in bytes."""
    found = re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _text(root / "proc/meminfo"), flags=re.MULTILINE)
    return {name: 1024 * int(number) for name, number in found}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def check_cores(facts: Mapping[str, Facts]) -> Check:
    """Compare the cores that this process may use with the number of threads."""
    machine = facts_of(facts, "machine")
    usable, limit, threads = machine["usable_cores"], machine["core_limit"], machine["threads"]
    found = f"{counted(machine['cores'], 'core')}, {usable} for this process"
    if limit is not None and limit < usable:
        found += f"; its control group allows {limit:.3g}"
        usable = max(1, math.floor(limit))
        if threads is None:
            return note("CPU", f"{found}, but torch starts more threads", f"export OMP_NUM_THREADS={usable}")
    found += f"; OMP_NUM_THREADS={threads}" if threads is not None else ""
    if threads is not None and threads.isdigit() and int(threads) > usable:
        return note("CPU", f"{found}, more threads than cores", f"export OMP_NUM_THREADS={usable}")
    return ok("CPU", found)


def check_memory(facts: Mapping[str, Facts]) -> Check:
    """Check the memory that is available."""
    machine = facts_of(facts, "machine")
    memory, limit = machine["memory"], machine["memory_limit"]
    total, available = memory.get("MemTotal", 0), memory.get("MemAvailable", 0)
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if limit is not None and limit < total:
        found += f"; the control group of this process allows {limit / GIB:.1f} GiB"
        available = min(available, limit)
    if available < LEAST_MEMORY_GIB * GIB:
        remedy = "end other programs; docker run --memory=8g, or sbatch --mem=8G"
        return note("memory", f"{found}: a rank with a small network takes about 1 GiB", remedy)
    return ok("memory", found)


def check_shared_memory(facts: Mapping[str, Facts]) -> Check:
    """Check the size of /dev/shm, through which ranks, NCCL and worker processes exchange data."""
    shared = facts_of(facts, "shared_memory")
    if "error" in shared:
        return note(SHARED_MEMORY, f"cannot be read: {shared['error']}", f"mount -t tmpfs tmpfs {SHARED_MEMORY}")
    found = f"{shared['free'] / GIB:.2g} of {shared['total'] / GIB:.2g} GiB free"
    if shared["free"] < LEAST_SHARED_GIB * GIB:
        why = "MPI, NCCL and the processes of data.workers may fail with a bus error"
        return note(SHARED_MEMORY, f"{found}: {why}", "docker run --shm-size=8g; or remove old files there")
    return ok(SHARED_MEMORY, found)
