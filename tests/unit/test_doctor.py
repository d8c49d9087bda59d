"""`doctor`: each check with facts of other machines, and the facts that are found on this one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.cli.doctor import json_text, summary, table_text
from hvd_batchgrow.doctor import checkup, folder_checks
from hvd_batchgrow.doctor.check import Check, Facts, Status, fail, note, ok
from hvd_batchgrow.doctor.checkup import CHECKS, judge
from hvd_batchgrow.doctor.folder_checks import folder_facts
from hvd_batchgrow.doctor.gather import gather
from hvd_batchgrow.doctor.import_process import imported_facts
from hvd_batchgrow.doctor.machine_checks import core_limit, machine_facts, memory_limit
from hvd_batchgrow.doctor.mpi_checks import mpi_of
from hvd_batchgrow.doctor.rank_checks import check_versions, other_failures
from hvd_batchgrow.doctor.tool import tool_facts
from hvd_batchgrow.doctor.torch_checks import driver_facts, has_code_for

GIB = 2**30
H200 = {"name": "NVIDIA H200", "capability": [9, 0], "memory_gib": 139.8}
LISTED = {"name": "NVIDIA H200", "compute_cap": "9.0", "compute_mode": "Default", "mig.mode.current": "Disabled"}
CUDA_TORCH = {
    **{"version": "2.13.0+cu130", "cuda": "13.0", "kernels": "AVX2", "has_distributed": True, "gpus": [H200]},
    **{"why_no_gpu": "", "architectures": ["sm_80", "sm_90", "compute_90"], "driver": "580.65", "driver_cuda": "13.0"},
    "nccl": "2.27.7",
}
NO_GPU_TORCH = {**CUDA_TORCH, "gpus": []}
CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "kernels": "AVX2", "has_distributed": True}
MPIRUN = {"path": "/usr/bin/mpirun", "code": 0, "output": "mpirun (Open MPI) 4.1.4\n\nReport bugs to"}
MPI4PY = {"version": "4.1.2", "library": "Open MPI v4.1.4, package: Debian", "files": ["/usr/lib/libmpi.so.40"]}
HOROVOD = {"version": "0.28.1", "has_mpi": True, "has_gloo": True, "nccl": None, "files": ["/usr/lib/libmpi.so.40"]}
FOLDER = {
    **{"folder": "runs", "existing": "runs", "type": "nfs4", "free": 50 * GIB, "total": 100 * GIB, "has_inodes": True},
    **{"write_s": 0.0123, "lock": "works"},
}
GOOD: dict[str, Facts] = {
    "python": {"version": [3, 11, 7], "path": "/usr/bin/python3"},
    "package": {"version": "1.0.0", "folder": "/x", "extras": {"tables": {"pyarrow": "26.0"}}},
    "torch": CUDA_TORCH,
    "ghost_norms": {"is_built": True, "largest_difference": 1e-7},
    "driver": {"tool": {"path": "/x"}, "gpus": [LISTED], "visible_devices": None},
    "launcher": {"mpirun": MPIRUN, "is_root": False, "allows_root": False},
    "mpi4py": MPI4PY,
    "horovod": {**HOROVOD, "nccl": "2.27.7"},
    "dali": {"version": "2.4.0", "packages": ["nvidia-dali-cuda130"]},
    "slurm": {
        "sbatch": {"path": "/x", "code": 0, "output": "slurm 22.05"},
        "ping": {"path": "/x", "code": 0, "output": "Slurmctld(primary) at login1 is UP"},
    },
    "machine": {
        **{"cores": 8, "usable_cores": 8, "core_limit": None, "threads": None, "memory_limit": None},
        "memory": {"MemTotal": 32 * GIB, "MemAvailable": 16 * GIB},
    },
    "shared_memory": {"total": 16 * GIB, "free": 16 * GIB},
    "runs": FOLDER,
    "cache": FOLDER,
}


def verdict(name: str, **facts: Any) -> Check:
    """Return the check of this name on a good machine with other facts."""
    [found] = [check for check in judge({**GOOD, **facts}) if check.name == name]
    return found


def test_a_good_machine_has_nothing_to_improve() -> None:
    checks = judge(GOOD)
    assert [check for check in checks if check.status != "ok" or check.remedy] == []
    assert [check.name for check in checks] == [*[*CHECKS][:-1], "extra tables"]
    found = {check.name: check.found for check in checks}
    assert found["GPUs"] == "1 GPU (1 × NVIDIA H200); driver 580.65 for CUDA 13.0"
    assert found["MPI"] == "Open MPI 4.1.4 (/usr/bin/mpirun), mpi4py 4.1.2 uses Open MPI 4.1.4"
    assert found["runs folder"] == "runs (nfs4): 50.0 of 100.0 GiB free, replaces a file in 12.3 ms, locks work"


CASES: list[tuple[str, dict[str, Any], Status, str, str]] = [
    ("Python", {"python": {"version": [3, 10, 1], "path": "p"}}, "fail", "3.11 or newer", "PYTHON=python3.11"),
    ("hvd_batchgrow", {"package": {**GOOD["package"], "extras": None}}, "note", "not installed", "pip install -e ."),
    ("torch", {"torch": {"is_missing": True}}, "fail", "not installed", "make setup"),
    ("torch", {"torch": {"error": "OSError: libcudart"}}, "fail", "cannot be imported: OSError: libcudart", "setup"),
    ("torch", {"torch": {**CPU_TORCH, "version": "2.5.1"}}, "fail", "2.6 or newer", "torch>=2.6"),
    ("torch", {"torch": {**CPU_TORCH, "has_distributed": False}}, "note", "several ranks need Horovod", ""),
    ("ghost norms", {"ghost_norms": {"is_built": False}}, "note", "not built", "g++"),
    ("ghost norms", {"ghost_norms": {"is_built": True, "error": "wrong ELF"}}, "fail", "wrong ELF", "reinstall"),
    ("ghost norms", {"ghost_norms": {"is_built": True, "largest_difference": 0.5}}, "fail", "differs", "reinstall"),
    ("ghost norms", {"ghost_norms": {"is_built": True, "largest_difference": float("nan")}}, "fail", "nan", "reinst"),
    ("GPUs", {"torch": CPU_TORCH}, "fail", "nvidia-smi lists 1 GPU (1 × NVIDIA H200), and torch 2.13.0+cpu", "CUDA=1"),
    ("GPUs", {"torch": {"error": "x"}}, "fail", "torch cannot be imported", "HVD_BATCHGROW_CUDA=1"),
    (
        *("GPUs", {"torch": NO_GPU_TORCH, "driver": {**GOOD["driver"], "visible_devices": ""}}),
        *("note", "CUDA_VISIBLE_DEVICES='' hides them", "unset CUDA_VISIBLE_DEVICES"),
    ),
    (
        *("GPUs", {"torch": {**NO_GPU_TORCH, "driver_cuda": "12.4", "why_no_gpu": "too old"}}),
        *("fail", "supports CUDA 12.4, and torch is built for CUDA 13.0", "built for CUDA 12"),
    ),
    ("GPUs", {"torch": {**NO_GPU_TORCH, "why_no_gpu": "error 802"}}, "fail", "error 802", "nvidia-smi"),
    (
        *("GPUs", {"torch": {**CUDA_TORCH, "gpus": [{**H200, "capability": [7, 5]}]}}),
        *("fail", "no code for compute capability 7.5: sm_80 sm_90 compute_90", ""),
    ),
    ("GPUs", {"driver": {**GOOD["driver"], "gpus": [LISTED] * 4}}, "note", "torch sees 1 of 4 GPUs", ""),
    (
        *("GPUs", {"driver": {"gpus": [{**LISTED, "compute_mode": "Exclusive_Process"}]}}),
        *("note", "one rank per GPU", ""),
    ),
    ("GPUs", {"driver": {"gpus": [{**LISTED, "compute_mode": "Prohibited"}]}}, "fail", "Prohibited", "-c DEFAULT"),
    ("GPUs", {"driver": {"gpus": [{**LISTED, "mig.mode.current": "Enabled"}]}}, "note", "MIG is on", ""),
    (
        *("GPUs", {"torch": NO_GPU_TORCH, "driver": {"gpus": [], "has_kernel_module": True, "device_files": []}}),
        *("note", "started without a GPU", "--gpus all"),
    ),
    (
        *("GPUs", {"torch": CPU_TORCH, "driver": {"gpus": [], "tool": {"error": "nvidia-smi did not finish"}}}),
        *("note", "nvidia-smi did not finish", "administrator"),
    ),
    (
        *("GPUs", {"torch": CPU_TORCH, "driver": {"gpus": [], "tool": {"code": 9, "output": "NVML: mismatch"}}}),
        *("note", "nvidia-smi fails: NVML: mismatch", ""),
    ),
    ("GPUs", {"torch": CPU_TORCH, "driver": {"gpus": [], "tool": {"path": None}}}, "ok", "uses the CPU", ""),
    ("NCCL", {"torch": CPU_TORCH, "horovod": HOROVOD}, "ok", "not needed", ""),
    ("NCCL", {"horovod": HOROVOD}, "note", "2.27.7 in torch; Horovod is built without NCCL", "CUDA_HOME="),
    ("NCCL", {"torch": {**CUDA_TORCH, "nccl": None}, "horovod": HOROVOD}, "note", "over Gloo", "CUDA=1"),
    ("MPI", {"launcher": {"mpirun": {"path": None}}}, "note", "mpirun is not on PATH", "module load openmpi"),
    (
        "MPI",
        {"launcher": {"mpirun": {"path": "/m", "error": "/m did not finish within 10 s"}}},
        "fail",
        "did not finish",
        "apt",
    ),
    ("MPI", {"launcher": {"mpirun": {"path": "/m", "code": 127, "output": "no lib"}}}, "fail", "fails: no lib", "apt"),
    ("MPI", {"mpi4py": {"is_missing": True}}, "note", "mpi4py is not installed", "hvd_batchgrow[mpi]"),
    ("MPI", {"mpi4py": {"error": "cannot load MPI library"}}, "fail", "cannot load MPI library", "mpicc"),
    (
        *("MPI", {"mpi4py": {**MPI4PY, "library": "MPICH Version:\t4.0.2"}}),
        *("fail", "mpi4py 4.1.2 uses MPICH 4.0.2 (/usr/lib/libmpi.so.40): each rank would train alone", "mpicc"),
    ),
    ("MPI", {"mpi4py": {**MPI4PY, "library": "Open MPI v5.0.7, package"}}, "fail", "uses Open MPI 5.0.7", "mpicc"),
    (
        *("MPI", {"launcher": {"mpirun": MPIRUN, "is_root": True, "allows_root": False}}),
        *("note", "refuses to run as root", "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"),
    ),
    ("MPI", {"launcher": {"mpirun": MPIRUN, "is_root": True, "allows_root": True}}, "ok", "4.1.4", ""),
    ("Horovod", {"horovod": {"is_missing": True}}, "note", "torch.distributed", "make setup"),
    (
        "Horovod",
        {"horovod": {"error": "ImportError: undefined symbol"}},
        "fail",
        "undefined symbol",
        "make clean setup",
    ),
    (
        "Horovod",
        {"horovod": {**HOROVOD, "files": ["/opt/libmpi.so.12"]}},
        "fail",
        "linked to /opt/libmpi.so.12",
        "mpic",
    ),
    ("Horovod", {"horovod": {**HOROVOD, "has_mpi": False}}, "note", "under mpirun", "mpicc"),
    (
        *("Horovod", {"horovod": {**HOROVOD, "has_mpi": False, "has_gloo": False}}),
        *("fail", "with no library, without MPI, Gloo, NCCL: it cannot connect ranks", "mpicc"),
    ),
    ("DALI", {"dali": {"is_missing": True}}, "note", "data.pipeline", "hvd_batchgrow[dali-cuda130]"),
    ("DALI", {"dali": {"error": "ImportError: libnvjpeg"}}, "fail", "libnvjpeg", 'data.pipeline = "torch"'),
    ("DALI", {"torch": {**CUDA_TORCH, "driver_cuda": "12.8"}}, "fail", "supports CUDA 12.8", "nvidia-dali-cuda120"),
    ("CPU", {"machine": {**GOOD["machine"], "core_limit": 2.5}}, "note", "allows 2.5", "OMP_NUM_THREADS=2"),
    ("CPU", {"machine": {**GOOD["machine"], "core_limit": 2.0, "threads": "1"}}, "ok", "OMP_NUM_THREADS=1", ""),
    ("CPU", {"machine": {**GOOD["machine"], "threads": "64"}}, "note", "more threads than cores", "OMP_NUM_THREADS=8"),
    ("memory", {"machine": {**GOOD["machine"], "memory_limit": GIB}}, "note", "allows 1.0 GiB", "--mem"),
    (
        *("memory", {"machine": {**GOOD["machine"], "memory": {"MemTotal": 4 * GIB, "MemAvailable": GIB}}}),
        *("note", "1.0 of 4.0 GiB", "end other programs"),
    ),
    ("/dev/shm", {"shared_memory": {"total": GIB // 16, "free": GIB // 16}}, "note", "bus error", "--shm-size"),  # noqa: S108
    ("/dev/shm", {"shared_memory": {"error": "no such folder"}}, "note", "no such folder", "mount"),  # noqa: S108
    ("runs folder", {"runs": {"error": "no answer within 65 s"}}, "fail", "no answer within 65 s", "--runs-dir"),
    ("runs folder", {"runs": {**FOLDER, "error": "Read-only file system"}}, "fail", "Read-only file system", "--runs"),
    ("runs folder", {"runs": {**FOLDER, "free": GIB // 100}}, "fail", "0.0 of 100.0 GiB", "--runs-dir"),
    ("runs folder", {"runs": {**FOLDER, "has_inodes": False}}, "fail", "no file can be created", "--runs-dir"),
    ("runs folder", {"runs": {**FOLDER, "free": GIB}}, "note", "1.0 of 100.0 GiB", "remove old runs"),
    ("runs folder", {"runs": {**FOLDER, "lock": "two processes hold one lock"}}, "fail", "hold one lock", "nolock"),
    (
        "cache folder",
        {"cache": {**FOLDER, "lock": "refused: No locks"}},
        "fail",
        "refused: No locks",
        "BATCHGROW_CACHE",
    ),
    ("Slurm", {"slurm": {"sbatch": {"path": None}, "ping": {}}}, "note", "not on PATH", ""),
    (
        "Slurm",
        {"slurm": {"sbatch": {"path": "/s", "error": "/s did not finish"}, "ping": {}}},
        "note",
        "did not finish",
        "adm",
    ),
    ("Slurm", {"slurm": {"sbatch": {"path": "/s", "code": 1, "output": "no DNS"}, "ping": {}}}, "note", "DNS", "login"),
    (
        *("Slurm", {"slurm": {**GOOD["slurm"], "ping": {"path": "/x", "code": 1, "output": "ctl is DOWN"}}}),
        *("note", "slurm 22.05, but its controller does not answer: ctl is DOWN", "scontrol ping"),
    ),
    (
        *(
            "extra tables",
            {"package": {**GOOD["package"], "extras": {"tables": {"pyarrow": "26", "scikit-learn": None}}}},
        ),
        *("note", "pyarrow 26, scikit-learn is not installed", "pip install 'hvd_batchgrow[tables]'"),
    ),
]


@pytest.mark.parametrize(("name", "facts", "status", "found", "remedy"), CASES)
def test_a_machine_with_a_fault(name: str, facts: dict[str, Any], status: Status, found: str, remedy: str) -> None:
    check = verdict(name, **facts)
    assert (check.status, found in check.found, remedy in check.remedy) == (status, True, True), check


@pytest.mark.parametrize("part", [*GOOD])
def test_an_error_in_any_part_crashes_no_check(part: str) -> None:
    checks = judge({**GOOD, part: {"error": "no answer within 65 s"}})
    assert {check.name for check in checks} >= {*CHECKS} - {"extras"}
    assert any("no answer within 65 s" in check.found for check in checks if check.status != "ok")


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 6), ["sm_80"], True),  # binaries run on later minor versions
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # PTX is compiled for later GPUs
        ((10, 0), ["sm_90a", "compute_90a"], False),  # for 9.0 only
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100", "unknown"], True),
        ((7, 5), ["sm_100"], False),
    ],
)
def test_compute_capabilities_that_a_build_of_torch_supports(
    capability: tuple[int, int], architectures: list[str], expected: bool
) -> None:
    assert has_code_for(capability, architectures) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mpirun (Open MPI) 5.0.7\n", ("Open MPI", "5.0.7")),
        ("mpirun (OpenRTE) 4.0.3", ("Open MPI", "4.0.3")),
        ("HYDRA build details:\n    Version:      4.0.2\n", ("MPICH", "4.0.2")),
        ("MPICH Version:      4.0.2\nMPICH ABI: 14:2:2", ("MPICH", "4.0.2")),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307", ("Intel MPI", "2021.9")),
        ("something else", ("", "")),
    ],
)
def test_the_name_and_version_of_an_mpi(text: str, expected: tuple[str, str]) -> None:
    assert mpi_of(text) == expected


# --- collecting facts -----------------------------------------------------------------------------


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_tool_that_is_missing_fails_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert tool_facts(["not-here"]) == {"path": None}
    program(tmp_path, "failing", 'echo "no $1, rank $OMPI_COMM_WORLD_RANK." >&2; exit 3')
    expected = {"path": str(tmp_path / "failing"), "code": 3, "output": "no driver, rank ."}
    assert tool_facts(["failing", "driver"]) == expected
    program(tmp_path, "hanging", "sleep 1000")  # sh waits for its child, which keeps the pipe open
    start = time.monotonic()
    assert "did not finish within 0.2 s" in tool_facts(["hanging"], 0.2)["error"]
    assert time.monotonic() - start < 60
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "empty").chmod(0o755)
    assert "cannot be run" in tool_facts(["empty"])["error"]


def test_the_gpus_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    program(tmp_path, "nvidia-smi", 'echo "NVIDIA H200, 9.0, Default, Disabled, 580.65"; echo "a warning"')
    facts = driver_facts()
    assert facts["gpus"] == [{**LISTED, "driver_version": "580.65"}]
    assert facts["visible_devices"] == "1"
    program(tmp_path, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    assert driver_facts()["gpus"] == []


def test_an_import_that_crashes_does_not_affect_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import os; print('noise'); os.kill(os.getpid(), 4)")
    (tmp_path / "mpi4py.py").write_text("raise RuntimeError('cannot load MPI library\\nhint')")
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia/__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert imported_facts(["mpi4py", "torch", "dali"], 60) == {
        "mpi4py": {"error": "RuntimeError: cannot load MPI library"},
        "torch": {"error": "its import ended the process (SIGILL); noise"},
        "dali": {"is_missing": True},
    }


def test_an_import_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert imported_facts(["torch", "horovod"], 1) == {
        "torch": {"error": "its import did not finish within 1 s"},
        "horovod": {"error": "not imported: other imports took 1 s"},
    }


def test_functions_that_fail_or_hang_do_not_affect_others() -> None:
    def failing() -> Facts:
        raise OSError(errno.EIO, "Input/output error")

    def hanging() -> Facts:
        time.sleep(1000)
        return {}

    assert gather({"good": lambda: {"n": 1}, "failing": failing, "hanging": hanging}, 0.1) == {
        "good": {"n": 1},
        "failing": {"error": "OSError: [Errno 5] Input/output error"},
        "hanging": {"error": "no answer within 0.1 s"},
    }


def test_a_folder_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    facts = folder_facts(tmp_path / "a/b")
    assert (facts["existing"], facts["lock"], [*tmp_path.iterdir()]) == (str(tmp_path), "works", [])
    assert 0 < facts["write_s"] < 60
    assert 0 < facts["free"] <= facts["total"]
    assert facts["type"] == subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout.strip().replace("ext2/ext3", "ext4").replace("overlayfs", "overlay")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert "error" in folder_facts(Path("/proc/self"))
    (tmp_path / "file").write_text("")
    assert folder_facts(tmp_path / "file")["error"] == f"{tmp_path / 'file'} is not a folder"


def test_locks_that_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("hvd_batchgrow.storage.file_lock.fcntl.flock", refuse)
        assert folder_facts(tmp_path)["lock"] == "refused: No locks available"
    monkeypatch.setattr(folder_checks, "locked", lambda *_, **__: nullcontext())
    assert folder_facts(tmp_path)["lock"] == "two processes hold one lock"


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, None, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/a/memory.max": "1073741824\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
            },
            1.5,
            GIB,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "2147483648\n",
            },
            2.0,
            2 * GIB,
        ),
    ],
)
def test_the_limits_of_control_groups(
    tmp_path: Path, files: dict[str, str], cores: float | None, memory: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert (core_limit(tmp_path), memory_limit(tmp_path)) == (cores, memory)


def test_this_machine_has_cores_and_memory() -> None:
    facts = machine_facts()
    assert 1 <= facts["usable_cores"] <= facts["cores"]
    assert 0 < facts["memory"]["MemAvailable"] <= facts["memory"]["MemTotal"]


# --- ranks ---------------------------------------------------------------------------------------


def report(host: str, *checks: Check, **versions: str) -> dict[str, Any]:
    return {"host": host, "versions": versions, "checks": [check.to_dict() for check in checks]}


def test_versions_that_differ_between_hosts_are_listed_with_their_ranks() -> None:
    same = [report("n1", torch="2.13.0"), report("n1", torch="2.13.0"), report("n2", torch="2.13.0")]
    assert check_versions(same) == ok("versions", "3 ranks on 2 hosts have the same versions of 1 package")
    other = check_versions([*same, report("n3", torch="2.12.0", horovod="0.28.1")])
    assert other.status == "fail"
    expected = (
        "torch: 2.13.0 on n1 (rank 0) and 2 other ranks; 2.12.0 on n3 (rank 3); "
        "horovod: not installed on n1 (rank 0) and 2 other ranks; 0.28.1 on n3 (rank 3)"
    )
    assert other.found == expected


def test_failures_of_other_hosts_are_reported_once() -> None:
    full = fail("runs folder", "full", "another folder")
    reports = [report("n1", fail("GPUs", "x")), *[report("n2", full, fail("GPUs", "x"), note("Slurm", "no"))] * 2]
    assert other_failures(reports) == [fail("runs folder on n2", "full", "another folder")]


# --- the command ---------------------------------------------------------------------------------

MIXED = [
    ok("torch", "2.13.0"),
    note("Slurm", "no sbatch"),
    fail("runs folder", "x" * 90 + " and more", "rm -r " + "y" * 70),
]


def test_a_report_fits_80_columns_and_breaks_no_path() -> None:
    lines = table_text([note("Horovod", " ".join(["word"] * 60), "make setup"), *MIXED], 80).splitlines()
    assert all(len(line) <= 80 or "x" * 90 in line or "y" * 70 in line for line in lines)
    assert [line.split()[:2] for line in lines if line[:4].strip()] == [
        *(["note", "Horovod"], ["ok", "torch"], ["note", "Slurm"], ["fail", "runs"])
    ]
    assert sum("→" in line for line in lines) == 2
    assert summary(MIXED) == "1 check failed (1 note, 1 ok): see the lines that begin with fail"
    assert summary(MIXED[:2]) == "no check failed (1 note, 1 ok)"


def test_json_has_every_check_whole() -> None:
    found = json.loads(json_text(MIXED))
    assert found == {"passed": False, "checks": [check.to_dict() for check in MIXED]}
    assert [*found["checks"][0]] == ["name", "status", "found", "remedy"]


@pytest.mark.parametrize(("checks", "code"), [(MIXED[:2], 0), (MIXED, 1)])
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_exit_codes(
    checks: list[Check],
    code: int,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("hvd_batchgrow.cli.doctor.machine_checks", lambda _: checks)
    assert main(["doctor", *words]) == code
    printed = capsys.readouterr().out
    assert (
        json.loads(printed)["passed"] == (code == 0) if words else printed.endswith("ok)\n" if not code else "fail\n")
    )


def run_doctor(environment: dict[str, str], folder: Path, *words: str) -> tuple[int, dict[str, Check]]:
    done = subprocess.run(
        [sys.executable, "-m", "hvd_batchgrow.cli", "doctor", "--json", *words],
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    return done.returncode, {check["name"]: Check(**check) for check in report["checks"]}


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    code, checks = run_doctor({"OMPI_ALLOW_RUN_AS_ROOT": ""}, tmp_path, "--runs-dir", str(tmp_path / "runs"))
    assert code == any(check.status == "fail" for check in checks.values())
    assert {*checks} >= {*CHECKS} - {"extras"}
    assert checks["torch"].status == checks["ghost norms"].status == checks["runs folder"].status == "ok"
    assert (checks["MPI"].status == "note") == (not shutil.which("mpirun") or os.geteuid() == 0)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_a_machine_whose_torch_and_horovod_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    code, checks = run_doctor({"PYTHONPATH": path, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, tmp_path)
    assert code == 1
    assert "libtorch.so" in checks["torch"].found
    assert "libtorch.so" in checks["Horovod"].found
    assert checks["ranks"] == fail("ranks", "not checked, because rank 0 cannot use torch")


@pytest.mark.slow
def test_ranks_that_do_not_find_each_other_are_ended(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from hvd_batchgrow.cli import doctor, main; doctor.CONNECT_TIMEOUT_S = 0.2; "
        "doctor.machine_checks = lambda _: []; doctor._connected_checks = lambda _: time.sleep(1000); "
        "main(['doctor'])"
    )
    environment = {**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "mpirun has started 2 ranks, but they have not all connected within 0.2 s" in " ".join(done.stdout.split())


def test_every_part_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: set[str] = set()
    imported = {"torch", "ghost_norms", "horovod", "mpi4py", "dali"}

    def record(functions: dict[str, Any], _: float) -> dict[str, Facts]:
        parts.update(functions)
        return {name: {part: {} for part in imported} for name in functions}

    monkeypatch.setattr(checkup, "gather", record)
    checkup.machine_checks(tmp_path)
    assert parts - {"imports", "more imports"} | imported == {*GOOD}
