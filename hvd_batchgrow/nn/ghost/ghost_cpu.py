"""Ghost batch norm for float32 on a CPU by ghost_cpu.c, optionally followed by a ReLU."""

from __future__ import annotations

import ctypes
import itertools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hvd_batchgrow.nn.ghost.ghost_function import GhostNormalize, KeepSums

_SIDE_BY_SIDE = 16
"""Channels in a block that is never split: one cache line."""
_VALUES_A_THREAD = 2**18
"""Least values per thread: for fewer, starting the thread takes longer than the work."""


class _Part(ctypes.Structure):
    """`Part` of ghost_cpu.c."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("samples", "channels", "pixels", "channels_last", "relu"),
            *("first_group", "end_group", "first_channel", "end_channel"),
        )
    )


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled ghost_cpu.c; None if it was not compiled or, with a warning, if it cannot be loaded."""
    found = find_spec("hvd_batchgrow.nn.ghost._ghost_cpu")
    if found is None or found.origin is None:
        return None
    try:
        return load(found.origin)
    except (OSError, AttributeError) as error:  # compiled for another machine, or from an earlier ghost_cpu.c
        fault = f"ghost norms on a CPU use PyTorch's operations, which are slower: {error}"
        warnings.warn(f"{fault}; to rebuild the library: make setup", stacklevel=4)
        return None


def load(path: str) -> ctypes.CDLL:
    """Load a library, whose calls release the GIL. Raises OSError or AttributeError if it cannot be used."""
    loaded = ctypes.CDLL(path)
    part, pointer = ctypes.POINTER(_Part), ctypes.c_void_p
    loaded.ghost_normalize.argtypes = [part, ctypes.c_double, *[pointer] * 6]
    loaded.ghost_differentiate.argtypes = [part, *[pointer] * 8]
    loaded.ghost_normalize.restype = loaded.ghost_differentiate.restype = None
    return loaded


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_ghost_batches: int,
    eps: float,
    *,
    relu: bool = False,
    keep_sums: KeepSums | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `ghost_reference.normalize` in one call forward and one backward. Requires a `library()`.

    The result of a ghost batch is bit-identical for any number of other ghost batches and of threads.

    Args:
        x: float32 (k·γ, C, …) on a CPU; a ghost batch has 2 values of a channel or more.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        num_ghost_batches: k.
        eps: added to the variance.
        relu: whether the output is max(0, ·).
        keep_sums: is called in each backward.

    Returns:
        The output, with the shape and layout of x; and float32 (k, 2, C), mean and unbiased variance of each
        ghost batch, without gradient.
    """
    return GhostNormalize.apply(CKernels, x, weight, bias, num_ghost_batches, eps, relu, keep_sums)  # type: ignore[no-untyped-call,no-any-return]


class CKernels:
    """Kernel calls for inputs of one shape and layout. Each call processes some ghost batches and channels."""

    def __init__(self, x: Tensor, num_ghost_batches: int, *, relu: bool) -> None:
        loaded = library()
        assert loaded, "choose() returns this implementation only if the library is loaded"
        self.library = loaded
        num_pixels = x.numel() // (x.shape[0] * x.shape[1])
        shape = (
            x.shape[0] // num_ghost_batches,
            x.shape[1],
            num_pixels,
            not x.is_contiguous() or num_pixels == 1,
            relu,
        )
        num_threads = max(1, min(torch.get_num_threads(), x.numel() // _VALUES_A_THREAD))
        parts = cut(num_ghost_batches, x.shape[1], num_threads)
        self.parts = [_Part(*shape, *groups, *channels) for groups, channels in parts]

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, results: tuple[Tensor, ...], eps: float
    ) -> None:
        """See `ghost_function.Kernels`."""
        self._call(self.library.ghost_normalize, (x, _readable(weight), _readable(bias), *results), eps)

    def backward(self, saved: tuple[Tensor | None, ...], grad_x: Tensor, sums: Tensor) -> None:
        """See `ghost_function.Kernels`."""
        x, grad_y, weight, bias, *statistics = saved
        tensors = (x, grad_y, _readable(weight), _readable(bias), *statistics, grad_x, sums)
        self._call(self.library.ghost_differentiate, tensors)

    def _call(self, function: Callable[..., None], tensors: tuple[Tensor | None, ...], *numbers: float) -> None:
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        first, *others = self.parts
        futures = [_pool(os.getpid()).submit(function, part, *numbers, *pointers) for part in others]
        function(first, *numbers, *pointers)
        for future in futures:
            future.result()


def cut(num_ghost_batches: int, num_channels: int, num_threads: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Divide the work into about as many parts as threads: by ghost batches, and by channels if these are too few.

    Returns:
        For each part (first, end) of the ghost batches and (first, end) of the channels.
    """
    by_group = min(num_ghost_batches, num_threads)
    blocks = -(-num_channels // _SIDE_BY_SIDE)
    by_channel = min(blocks, num_threads // by_group)
    groups = [num_ghost_batches * i // by_group for i in range(by_group + 1)]
    channels = [min(num_channels, blocks * i // by_channel * _SIDE_BY_SIDE) for i in range(by_channel + 1)]
    return [(g, c) for g in itertools.pairwise(groups) for c in itertools.pairwise(channels)]


def _readable(parameter: Tensor | None) -> Tensor | None:
    """Return a contiguous float32 parameter: the kernel accepts no views and no other types."""
    return None if parameter is None else parameter.to(torch.float32).contiguous()


@cache
def _pool(_: int) -> ThreadPoolExecutor:
    """Return the thread pool of a process id: a forked process does not inherit threads."""
    return ThreadPoolExecutor(os.cpu_count(), "ghost-norm")
