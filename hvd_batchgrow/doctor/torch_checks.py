"""Checks of torch, the GPUs that it can use, NCCL and DALI."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvd_batchgrow.doctor.check import Check, Facts, fail, note, ok
from hvd_batchgrow.doctor.gather import facts_of
from hvd_batchgrow.doctor.tool import first_line, tool_facts
from hvd_batchgrow.messages.wording import counted

CUDA_BUILD = "HVD_BATCHGROW_CUDA=1 make setup"
_COLUMNS = ("name", "compute_cap", "compute_mode", "mig.mode.current", "driver_version")


def driver_facts() -> Facts:
    """Return the GPUs that NVIDIA's driver lists, and the settings that can hide them from a process."""
    tool = tool_facts(["nvidia-smi", f"--query-gpu={','.join(_COLUMNS)}", "--format=csv,noheader"])
    lines = tool.get("output", "").splitlines() if tool.get("code") == 0 else []
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return {
        "tool": dict(tool),
        "gpus": [dict(zip(_COLUMNS, row, strict=True)) for row in rows if len(row) == len(_COLUMNS)],
        "device_files": sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*")),
        "has_kernel_module": Path("/proc/driver/nvidia/version").exists(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def check_torch(facts: Mapping[str, Facts]) -> Check:
    """Check that torch can be imported, and its build."""
    torch = facts_of(facts, "torch")
    if torch.get("is_missing"):
        return fail("torch", "not installed", "make setup, or pip install torch")
    if "error" in torch:
        return fail("torch", f"cannot be imported: {torch['error']}", "make clean setup")
    build = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "CPU build"
    found = f"{torch['version']}, {build}, {torch['kernels']} kernels on the CPU"
    version = [int(number) for number in re.findall(r"\d+", torch["version"])[:2]]
    if version < [2, 6]:
        return fail("torch", f"{found}; 2.6 or newer is needed", "pip install 'torch>=2.6'")
    if not torch["has_distributed"]:
        return note("torch", f"{found}; without torch.distributed, so several ranks need Horovod")
    return ok("torch", found)


def check_gpus(facts: Mapping[str, Facts]) -> Check:
    """Check that torch can use the GPUs of this machine, or find out why not."""
    torch, driver = facts_of(facts, "torch"), facts_of(facts, "driver")
    here = driver.get("gpus", [])
    if seen := torch.get("gpus"):
        visible = _check_visible(torch, seen, here)
        unknown = "error" in driver and visible.status == "ok"
        return note("GPUs", f"{visible.found}; nvidia-smi: {driver['error']}") if unknown else visible
    return _check_hidden(torch, driver) if here else _check_no_gpu(driver)


def _check_hidden(torch: Mapping[str, Any], driver: Mapping[str, Any]) -> Check:
    """Find out why torch does not see the GPUs that the driver lists."""
    names = f"nvidia-smi lists {_listed([gpu['name'] for gpu in driver['gpus']])}"
    if "version" not in torch:
        return fail("GPUs", f"{names}, and torch cannot be imported", CUDA_BUILD)
    if not torch["cuda"]:
        return fail("GPUs", f"{names}, and torch {torch['version']} is a CPU build: training uses the CPU", CUDA_BUILD)
    if (hidden := driver.get("visible_devices")) is not None:
        found = f"{names}, and CUDA_VISIBLE_DEVICES={hidden!r} hides them: training uses the CPU"
        return note("GPUs", found, "unset CUDA_VISIBLE_DEVICES")
    newest = torch.get("driver_cuda") or "0"
    if 0 < _major(newest) < _major(torch["cuda"]):
        found = f"{names}, but their driver supports CUDA {newest}, and torch is built for CUDA {torch['cuda']}"
        return fail("GPUs", found, f"a newer driver, or a torch built for CUDA {_major(newest)}")
    why = torch["why_no_gpu"] or "it sees 0 GPUs"
    return fail(
        "GPUs", f"{names}, but torch cannot use them: {why}", "nvidia-smi; python -c 'import torch.cuda as c; c.init()'"
    )


def _check_no_gpu(driver: Mapping[str, Any]) -> Check:
    tool = driver.get("tool", {})
    if driver.get("has_kernel_module") and not driver.get("device_files"):
        found = "NVIDIA's driver is loaded, but /dev has no nvidia0: this container or job was started without a GPU"
        return note("GPUs", found, "docker run --gpus all, apptainer exec --nv, or sbatch --gpus-per-task=1")
    if "error" in tool:
        return note("GPUs", tool["error"], "ask the administrator to check the driver")
    if tool.get("code"):
        return note("GPUs", f"nvidia-smi fails: {first_line(tool['output']) or 'no message'}", "nvidia-smi")
    return ok("GPUs", "this machine has no NVIDIA GPU: training uses the CPU")


def _check_visible(torch: Mapping[str, Any], seen: Sequence[Any], here: Sequence[Mapping[str, str]]) -> Check:
    """Check the GPUs that torch can use."""
    found = f"{_listed([gpu['name'] for gpu in seen])}; driver {torch['driver'] or 'unknown'} for CUDA "
    found += str(torch["driver_cuda"])
    for gpu in seen:
        if torch["architectures"] and not has_code_for(gpu["capability"], torch["architectures"]):
            capability = ".".join(map(str, gpu["capability"]))
            known = " ".join(torch["architectures"])
            return fail("GPUs", f"{found}; torch has no code for compute capability {capability}: {known}", CUDA_BUILD)
    limits = []
    if len(here) > len(seen):
        limits.append(f"torch sees {len(seen)} of {len(here)} GPUs (CUDA_VISIBLE_DEVICES, Slurm or the container)")
    modes = {gpu["compute_mode"] for gpu in here}
    if "Prohibited" in modes:
        return fail("GPUs", f"{found}; compute mode Prohibited: no process may use them", "sudo nvidia-smi -c DEFAULT")
    if "Exclusive_Process" in modes:
        limits.append("compute mode Exclusive_Process: one rank per GPU, and no other process on it")
    if any(gpu["mig.mode.current"] == "Enabled" for gpu in here):
        limits.append("MIG is on: a process can use one instance, and NCCL cannot connect instances of one GPU")
    return note("GPUs", "; ".join([found, *limits])) if limits else ok("GPUs", found)


def has_code_for(capability: Sequence[int], architectures: Sequence[str]) -> bool:
    """Return whether a build runs on a GPU: sm_XY runs from X.Y on within X, compute_XY (PTX) from X.Y on.

    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility". A suffix (sm_90a) is for that
    capability only.
    """
    major, minor = capability
    for architecture in architectures:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if parts is None:
            continue
        built = int(parts[2]), int(parts[3])
        if built == (major, minor) or (built[0] == major and built[1] <= minor and not parts[4]):
            return True
        if parts[1] == "compute" and built <= (major, minor) and not parts[4]:
            return True
    return False


def check_nccl(facts: Mapping[str, Facts]) -> Check:
    """Check that gradients can be all-reduced on several GPUs."""
    torch, horovod = facts_of(facts, "torch"), facts_of(facts, "horovod")
    versions = [
        f"{part['nccl']} in {name}" for name, part in (("torch", torch), ("Horovod", horovod)) if part.get("nccl")
    ]
    found = ", ".join(versions)
    if not torch.get("gpus"):
        return ok("NCCL", found or "not needed: torch uses no GPU")
    if not found:
        slow = "neither torch nor Horovod has NCCL: gradients of several GPUs are all-reduced over Gloo, which is slow"
        return note("NCCL", slow, CUDA_BUILD)
    if "version" in horovod and not horovod["nccl"]:
        found += "; Horovod is built without NCCL, so ranks with GPUs use torch.distributed"
        return note("NCCL", found, "CUDA_HOME=/usr/local/cuda HVD_BATCHGROW_CUDA=1 make setup")
    return ok("NCCL", found)


def check_dali(facts: Mapping[str, Facts]) -> Check:
    """Check that DALI can be imported and that the driver supports it."""
    dali, torch = facts_of(facts, "dali"), facts_of(facts, "torch")
    if dali.get("is_missing"):
        return note(
            "DALI", 'not installed: data.pipeline = "torch" decodes images', "pip install 'hvd_batchgrow[dali-cuda130]'"
        )
    if "error" in dali:
        return fail("DALI", f"cannot be imported: {dali['error']}", 'make clean setup; or data.pipeline = "torch"')
    newest = torch.get("driver_cuda") or "0"
    found = ", ".join([dali["version"], *dali["packages"]])
    majors = [int(name.removeprefix("nvidia-dali-cuda")) // 10 for name in dali["packages"]]
    if torch.get("gpus") and majors and 0 < _major(newest) < min(majors):
        found += f", but the driver supports CUDA {newest}"
        return fail("DALI", found, f"pip uninstall {' '.join(dali['packages'])}; pip install nvidia-dali-cuda120")
    return ok("DALI", found)


def _listed(names: Sequence[str]) -> str:
    """Return `2 GPUs (2 × NVIDIA H200)`."""
    counts = {name: names.count(name) for name in names}
    kinds = ", ".join(f"{count} × {name}" for name, count in counts.items())
    return f"{counted(len(names), 'GPU')} ({kinds})"


def _major(version: str) -> int:
    """Return 13 for "13.0"."""
    number = version.partition(".")[0]
    return int(number) if number.isdigit() else 0
