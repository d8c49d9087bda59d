"""Ghost batch norm of float32 on a CPU by ghost_cpu.c, with or without a ReLU after it."""

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

from hvd_batchgrow.nn.ghost.ghost_function import GhostNormalise

_SIDE_BY_SIDE = 16
"""Channels that stay together: a line of the cache."""
_VALUES_A_THREAD = 2**18
"""Fewer are not worth a thread of their own: to hand them to one takes longer."""


class _Part(ctypes.Structure):
    """`RankSubset` of ghost_cpu.c."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("samples", "channels", "pixels", "channels_last", "relu"),
            *("first_group", "end_group", "first_channel", "end_channel"),
        )
    )


@cache
def library() -> ctypes.CDLL | None:
    """What setup.py has made of ghost_cpu.c: None without a compiler and, with a warning, where it does not load."""
    found = find_spec("hvd_batchgrow.nn.ghost._ghost_cpu")
    if found is None or found.origin is None:
        return None
    try:
        return load(found.origin)
    except OSError as error:  # of another machine
        warnings.warn(f"ghost norms on a CPU use PyTorch's operations, which take longer: {error}", stacklevel=4)
        return None


def load(path: str) -> ctypes.CDLL:
    """The library of a file, whose calls let other threads of Python go on. Raises OSError if it is none."""
    loaded = ctypes.CDLL(path)
    part, pointer = ctypes.POINTER(_Part), ctypes.c_void_p
    loaded.ghost_normalise.argtypes = [part, ctypes.c_double, *[pointer] * 6]
    loaded.ghost_differentiate.argtypes = [part, *[pointer] * 8]
    loaded.ghost_normalise.restype = loaded.ghost_differentiate.restype = None
    return loaded


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it has memory of tensors read, which a trace has none of
def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """As `ghost_kernels.normalise`, in one call forward and one backward. To be used where there is a `library()`.

    A ghost batch gives the same bits alone and among others, and on any number of threads.

    Args:
        x: float32 (k·γ, C, …) on a CPU; a ghost batch has 2 values of a channel or more.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        num_groups: k.
        eps: added to the variance.
        relu: whether the output is max(0, ·).

    Returns:
        the output, of the shape and layout of x; and float32 (k, 2, C), mean and unbiased variance of each
        ghost batch, which have no gradient.
    """
    return GhostNormalise.apply(_Calls, x, weight, bias, num_groups, eps, relu)  # type: ignore[no-untyped-call,no-any-return]


class _Calls:
    """Calls for inputs of one shape and layout, each for a part of the ghost batches and channels."""

    def __init__(self, x: Tensor, num_groups: int, *, relu: bool) -> None:
        loaded = library()
        assert loaded, "choose() asks for it where it is"
        self.library = loaded
        num_pixels = x.numel() // (x.shape[0] * x.shape[1])
        shape = (x.shape[0] // num_groups, x.shape[1], num_pixels, not x.is_contiguous() or num_pixels == 1, relu)
        num_threads = max(1, min(torch.get_num_threads(), x.numel() // _VALUES_A_THREAD))
        parts = cut(num_groups, x.shape[1], num_threads)
        self.parts = [_Part(*shape, *groups, *channels) for groups, channels in parts]

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, results: tuple[Tensor, ...], eps: float
    ) -> None:
        """As `ghost_function.Kernels` has it."""
        self._call(self.library.ghost_normalise, (x, _readable(weight), _readable(bias), *results), eps)

    def backward(self, saved: tuple[Tensor | None, ...], grad_x: Tensor, sums: Tensor) -> None:
        """As `ghost_function.Kernels` has it."""
        x, grad_y, weight, bias, *statistics = saved
        tensors = (x, grad_y, _readable(weight), _readable(bias), *statistics, grad_x, sums)
        self._call(self.library.ghost_differentiate, tensors)

    def _call(self, function: Callable[..., None], tensors: tuple[Tensor | None, ...], *numbers: float) -> None:
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        mine, *others = self.parts
        going = [_pool(os.getpid()).submit(function, part, *numbers, *pointers) for part in others]
        function(mine, *numbers, *pointers)
        for one in going:
            one.result()


def cut(num_groups: int, num_channels: int, num_threads: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Parts, about as many as threads: first and end of ghost batches, and of channels where those are too few."""
    by_group = min(num_groups, num_threads)
    blocks = -(-num_channels // _SIDE_BY_SIDE)
    by_channel = min(blocks, num_threads // by_group)
    groups = [num_groups * i // by_group for i in range(by_group + 1)]
    channels = [min(num_channels, blocks * i // by_channel * _SIDE_BY_SIDE) for i in range(by_channel + 1)]
    return [(g, c) for g in itertools.pairwise(groups) for c in itertools.pairwise(channels)]


def _readable(parameter: Tensor | None) -> Tensor | None:
    """Which may be a view, or of another type."""
    return None if parameter is None else parameter.to(torch.float32).contiguous()


@cache
def _pool(_: int) -> ThreadPoolExecutor:
    """Of a process: a fork inherits no threads."""
    return ThreadPoolExecutor(os.cpu_count(), "ghost-norm")
