"""A process that imports the packages that training needs, and reports their versions and builds.

python -m hvd_batchgrow.doctor.import_child PART ...

Each part is one line of JSON, [PART, facts], after a line [PART, null] when its import begins. So the parent
process (`import_process.py`) knows which import has crashed or hangs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from hvd_batchgrow.doctor.check import Facts
from hvd_batchgrow.doctor.gather import error_text
from hvd_batchgrow.storage.strict_json import dump_json


def torch_facts() -> Facts:
    """Return version and build of torch, and the GPUs that it can use."""
    import torch

    facts = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "has_distributed": torch.distributed.is_available(),
    }
    return {**facts, **_gpu_facts()} if torch.version.cuda else facts


def _gpu_facts() -> Facts:
    import torch

    from hvd_batchgrow.comm.hardware import driver_version, newest_cuda_of_driver

    why_not = ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why_not = error_text(error)
    gpus = []
    for index in range(0 if why_not else torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        gpus.append({"name": of.name, "capability": [of.major, of.minor], "memory_gib": of.total_memory / 2**30})
    return {
        "gpus": gpus,
        "why_no_gpu": why_not,
        "architectures": torch.cuda.get_arch_list(),
        "driver": driver_version(),
        "driver_cuda": newest_cuda_of_driver(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
    }


def ghost_norm_facts() -> Facts:
    """Return whether the C library of ghost norms is built, and agrees with PyTorch's operations on a small input."""
    import torch

    from hvd_batchgrow.nn.ghost import ghost_cpu, ghost_reference

    if find_spec("hvd_batchgrow.nn.ghost._ghost_cpu") is None:
        return {"is_built": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if ghost_cpu.library() is None:
            return {"is_built": True, "error": str(caught[0].message) if caught else "it cannot be loaded"}
    x = torch.linspace(-1, 1, 8 * 3 * 5).square().reshape(8, 3, 5).contiguous()
    ours, expected = (module.normalize(x, None, None, 2, 1e-5)[0] for module in (ghost_cpu, ghost_reference))
    return {"is_built": True, "largest_difference": float((ours - expected).abs().max())}


def mpi4py_facts() -> Facts:
    """Return the version of mpi4py and of its MPI library, without starting MPI."""
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    library = MPI.Get_library_version().replace("\0", "").strip().splitlines()[0]
    return {"version": mpi4py.__version__, "library": library, "files": mapped_files("libmpi.")}


def horovod_facts() -> Facts:
    """Return version and build of Horovod, and the MPI library that it is linked to."""
    from hvd_batchgrow.comm.horovod_build import build_facts

    return {**build_facts(), "files": mapped_files("libmpi.")}


def dali_facts() -> Facts:
    """Return the version of DALI and the names of its distributions, such as nvidia-dali-cuda130."""
    import nvidia.dali

    from hvd_batchgrow.train.run.versions import installed_versions

    packages = [name for name in installed_versions() if name.startswith("nvidia-dali-cuda")]
    return {"version": nvidia.dali.__version__, "packages": packages}


def mapped_files(name: str) -> list[str]:
    """Return the files of this process's memory whose names begin with `name`: the libraries that are loaded."""
    lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(str(path) for path in paths if path.name.startswith(name))


PARTS: dict[str, Callable[[], Facts]] = {
    "torch": torch_facts,
    "ghost_norms": ghost_norm_facts,
    "horovod": horovod_facts,
    "mpi4py": mpi4py_facts,
    "dali": dali_facts,
}


def missing(error: ModuleNotFoundError, part: str) -> bool:
    """Return whether a part itself is not installed, rather than something that it imports."""
    roots = {"dali": {"nvidia", "nvidia.dali"}, "ghost_norms": {"torch"}}
    return error.name in roots.get(part, {part})


def facts_of_part(part: str) -> Facts:
    """Return the facts of a part; `{"is_missing": True}` if it is not installed, or its error."""
    try:
        return PARTS[part]()
    except ModuleNotFoundError as error:
        return {"is_missing": True} if missing(error, part) else {"error": error_text(error)}
    except Exception as error:  # an import can raise anything
        return {"error": error_text(error)}


def main(parts: list[str]) -> None:
    """Report each part on stdout."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # packages may print
    for part in parts:
        print(dump_json([part, None]), file=report, flush=True)
        print(dump_json([part, facts_of_part(part)]), file=report, flush=True)
    report.flush()
    os._exit(0)  # some packages crash or hang while Python exits


if __name__ == "__main__":
    main(sys.argv[1:])
