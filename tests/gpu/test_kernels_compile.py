"""Compile the Triton kernels for several GPUs, without a GPU: the compiler finds errors that the interpreter misses."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_batchgrow.nn.ghost.ghost_tiles import choose_tiles, power_of_two
from tests.gpu.conftest import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from hvd_batchgrow.nn.ghost import ghost_triton_kernels
from hvd_batchgrow.nn.ghost.ghost_triton import COMPILER_OPTIONS

KERNELS = {
    "whole": ("normalize_whole", "differentiate_whole"),
    "splits": ("moments_of_splits", "normalize_splits", "sums_of_splits", "differentiate_splits"),
}
_OF_X = ("x", "y", "dy", "dx")

# Triton 3.7 on Python 3.13 builds syntax trees in a way that Python 3.15 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")


def compiled(name: str, constants: dict[str, Any], num_warps: int, dtype: str, capability: int) -> Any:
    """Compile a kernel for a compute capability; other tensors are float32, absent ones the constant None."""
    kernel = getattr(ghost_triton_kernels, name)
    sizes = {"num_values": "i32", "num_channels": "i32", "eps": "fp32"}
    signature, values = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[place,] = "constexpr", constants[argument]
        else:
            signature[argument] = sizes.get(argument, f"*{dtype if argument in _OF_X else 'fp32'}")
    source = triton.compiler.ASTSource(kernel, signature, values)
    options = {"num_warps": num_warps, **COMPILER_OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("num_pixels", "neighbors"), [(49, 49), (49, 1), (1024, 1024), (1024, 1)])
@pytest.mark.parametrize("plain", [False, True])
def test_kernels_compile_and_fit(capability: int, dtype: str, num_pixels: int, neighbors: int, plain: bool) -> None:
    num_channels = 1 if plain else 64
    tiles = choose_tiles(32 * num_pixels, num_channels, neighbors, 4 if dtype == "fp32" else 2)
    constants = {
        "RELU": not plain,
        "PIXELS": neighbors,
        "VALUES": tiles.num_values,
        "CHANNELS": tiles.num_channels,
        "TILES": tiles.num_per_program,
        "SPLITS": power_of_two(tiles.num_splits),
        # Triton specialises an argument of 1 to a constant.
        **({"weight": None, "bias": None, "num_channels": 1} if plain else {}),
    }
    for name in KERNELS["whole" if tiles.num_splits == 1 else "splits"]:
        kernel = compiled(name, constants, tiles.num_warps, dtype, capability)
        assert kernel.asm["cubin"]
        assert ".atomic" not in kernel.asm["ptx"]
        assert "red.global" not in kernel.asm["ptx"]
        assert kernel.metadata.shared <= 48 * 1024, "the shared memory that every GPU has by default"
