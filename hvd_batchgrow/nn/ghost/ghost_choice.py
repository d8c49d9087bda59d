"""Choose the implementation of a ghost norm: this package's kernels for suitable inputs, else PyTorch's operations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor

from hvd_batchgrow.nn.ghost import ghost_cpu, ghost_reference
from hvd_batchgrow.nn.ghost.ghost_function import KeepSums, Kernels
from hvd_batchgrow.nn.ghost.ghost_tiles import fits


class Normalize(Protocol):
    """Signature of `ghost_reference.normalize`, `ghost_cpu.normalize` and `ghost_triton.normalize`."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_ghost_batches: int,
        eps: float,
        *,
        relu: bool,
        keep_sums: KeepSums | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the statistics (k, 2, C)."""


_by_pytorch_only = False
_found: dict[torch.device, Normalize] = {}
"""The implementation for each GPU that has been used."""


def choose(x: Tensor, num_ghost_batches: int) -> Normalize:
    """Return the implementation for x: on a GPU the same one for any number of ghost batches, on a CPU for two or more.

    A ghost batch has therefore bit-identical results for all these numbers. On a CPU, a single ghost batch uses the
    function that `nn.BatchNorm` calls. Exact mode needs it: it depends on no compiler, and has second derivatives.
    """
    if _by_pytorch_only:
        return ghost_reference.normalize
    if x.device.type == "cpu":
        is_taken = x.dtype == torch.float32 and num_ghost_batches > 1 and kernels_for_cpu() == "C"
        return ghost_cpu.normalize if is_taken else ghost_reference.normalize
    is_taken = x.dtype in (torch.float32, torch.float16, torch.bfloat16) and fits(x.numel() // num_ghost_batches)
    return _on_gpu(x.device) if x.device.type == "cuda" and is_taken else ghost_reference.normalize


def kernels_for(x: Tensor, num_ghost_batches: int, *, relu: bool) -> Kernels:
    """Return the kernels of the implementation for x, which is dense."""
    chosen = choose(x, num_ghost_batches)
    if chosen is ghost_reference.normalize:
        return ghost_reference.PytorchKernels(x, num_ghost_batches, relu=relu)
    if chosen is ghost_cpu.normalize:
        return ghost_cpu.CKernels(x, num_ghost_batches, relu=relu)
    from hvd_batchgrow.nn.ghost.ghost_triton import TritonKernels

    return TritonKernels(x, num_ghost_batches, relu=relu)


def kernels_for_cpu() -> Literal["C", "PyTorch"]:
    """Return "C" if the compiled ghost_cpu.c can be used, else "PyTorch". Their results are equal to rounding."""
    return "C" if ghost_cpu.library() else "PyTorch"


def kernels_for_gpu(device: torch.device) -> str:
    """Return what ghost norms on a GPU use: Triton with its version, or "PyTorch". Their results differ by rounding."""
    return "PyTorch" if _on_gpu(device) is ghost_reference.normalize else f"Triton {metadata.version('triton')}"


@contextmanager
def by_pytorch_only() -> Iterator[None]:
    """Use PyTorch's operations for all forwards meanwhile, for comparisons and to search for faults of a kernel."""
    global _by_pytorch_only  # noqa: PLW0603  # one switch for all norms of the process
    before, _by_pytorch_only = _by_pytorch_only, True
    try:
        yield
    finally:
        _by_pytorch_only = before


def _on_gpu(device: torch.device) -> Normalize:
    if device not in _found:
        _found[device] = _find(device)
    return _found[device]


def _find(device: torch.device) -> Normalize:
    """Return the Triton implementation if Triton is installed and can compile for this GPU, else PyTorch's."""
    if find_spec("triton") is None:
        return ghost_reference.normalize
    try:
        from hvd_batchgrow.nn.ghost import ghost_triton

        ghost_triton.normalize(torch.ones(2, 1, device=device), None, None, 1, 1.0)
    except Exception as error:  # no compiler, a GPU that is too old, a Triton that does not know it
        warnings.warn(
            f"ghost norms on {device} use PyTorch's kernels, which are slower: Triton's cannot be built here "
            f"({type(error).__name__}: {error}); it needs a C compiler and Python's headers",
            stacklevel=4,
        )
        return ghost_reference.normalize
    normalize: Normalize = ghost_triton.normalize
    return normalize
