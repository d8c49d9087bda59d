"""How the installed Horovod is built."""

from __future__ import annotations

from typing import Any

from hvd_batchgrow.comm.ranks import version_text


def build_facts() -> dict[str, Any]:
    """Import Horovod, and return its version and the libraries that it can use.

    Raises:
        ImportError: it is missing, or was built for another torch.
    """
    import horovod
    import horovod.torch as hvd

    nccl = int(hvd.nccl_built())
    return {
        "version": horovod.__version__,
        "has_mpi": bool(hvd.mpi_built()),
        "has_gloo": bool(hvd.gloo_built()),
        "nccl": version_text(nccl) if nccl else None,
    }
