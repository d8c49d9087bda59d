"""Ghost batch norm on a GPU, optionally followed by a ReLU. Importing this module requires Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_batchgrow.nn.ghost import ghost_triton_kernels as kernels
from hvd_batchgrow.nn.ghost.ghost_function import GhostNormalize, KeepSums
from hvd_batchgrow.nn.ghost.ghost_tiles import choose_tiles, power_of_two

COMPILER_OPTIONS = {"enable_fp_fusion": True}
"""Multiplications and additions may be fused. Stated, because Triton's default may change, and the bits with it."""


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
    """Compute `ghost_reference.normalize` in one or two kernels forward and as many backward.

    The result of a ghost batch is bit-identical in every run and for any number of other ghost batches.

    Arguments and result are those of `ghost_cpu.normalize`, but x is float32, float16 or bfloat16, on a GPU (with
    Triton's interpreter, on any device), and `ghost_tiles.fits` its size.
    """
    return GhostNormalize.apply(TritonKernels, x, weight, bias, num_ghost_batches, eps, relu, keep_sums)  # type: ignore[no-untyped-call,no-any-return]


class TritonKernels:
    """The kernels for inputs of one shape and layout, with their common arguments."""

    def __init__(self, x: Tensor, num_ghost_batches: int, *, relu: bool) -> None:
        num_pixels = x.numel() // (x.shape[0] * x.shape[1])
        neighbors = num_pixels if x.is_contiguous() else 1
        self.num_ghost_batches, self.num_channels = num_ghost_batches, x.shape[1]
        self.num_values = x.shape[0] // num_ghost_batches * num_pixels
        self.tiles = choose_tiles(self.num_values, self.num_channels, neighbors, x.element_size())
        num_parts = -(-self.num_channels // self.tiles.num_channels)
        self.grid = (num_ghost_batches * num_parts, self.tiles.num_splits)
        self.constants = {
            "PIXELS": neighbors,
            "VALUES": self.tiles.num_values,
            "CHANNELS": self.tiles.num_channels,
            "num_warps": self.tiles.num_warps,
            **COMPILER_OPTIONS,
        }
        self.of_relu = {"RELU": relu}
        self.of_tiles = {"TILES": self.tiles.num_per_program}
        self.of_splits = {**self.of_tiles, "SPLITS": power_of_two(self.tiles.num_splits)}

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, results: tuple[Tensor, ...], eps: float
    ) -> None:
        """See `ghost_function.Kernels`."""
        sizes = (self.num_values, self.num_channels)
        weight, bias = _contiguous(weight), _contiguous(bias)
        with torch.cuda.device_of(x):
            if self.tiles.num_splits == 1:
                kernel = kernels.normalize_whole[self.grid]
                kernel(x, weight, bias, *results, *sizes, eps, **self.of_relu, **self.constants)
                return
            parts = self._parts(x)
            kernels.moments_of_splits[self.grid](x, parts, *sizes, **self.of_tiles, **self.constants)
            kernel = kernels.normalize_splits[self.grid]
            kernel(x, weight, bias, *results, parts, *sizes, eps, **self.of_relu, **self.of_splits, **self.constants)

    def backward(self, saved: tuple[Tensor | None, ...], grad_x: Tensor, sums: Tensor) -> None:
        """See `ghost_function.Kernels`."""
        sizes = (self.num_values, self.num_channels)
        x, grad_y, weight, bias, *statistics = saved
        saved = (x, grad_y, _contiguous(weight), _contiguous(bias), *statistics)
        with torch.cuda.device_of(grad_x):
            if self.tiles.num_splits == 1:
                kernel = kernels.differentiate_whole[self.grid]
                kernel(*saved, grad_x, sums, *sizes, **self.of_relu, **self.constants)
                return
            parts = self._parts(grad_x)
            kernel = kernels.sums_of_splits[self.grid]
            kernel(*saved, parts, *sizes, **self.of_relu, **self.of_tiles, **self.constants)
            kernel = kernels.differentiate_splits[self.grid]
            kernel(*saved, grad_x, sums, parts, *sizes, **self.of_relu, **self.of_splits, **self.constants)

    def _parts(self, x: Tensor) -> Tensor:
        return x.new_empty(self.num_ghost_batches, 2, self.tiles.num_splits, self.num_channels, dtype=torch.float32)


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    """Return a parameter without gaps between its values, as the kernels read it."""
    return None if parameter is None else parameter.contiguous()
