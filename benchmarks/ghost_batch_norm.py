"""Measure samples/s of ghost batch norm, forward and backward.

python -m benchmarks.ghost_batch_norm [--turns 41] [--samples 256] [--channels 64] [--ghost-batch 32] [--fresh-memory]
python -m benchmarks.ghost_batch_norm --device cuda [--dtype bfloat16]

The contestants are this package's norm, with its kernels if available and with PyTorch's operations;
nn.BatchNorm2d, which normalizes the whole micro-batch; and a loop of it over ghost batches, whose outputs are
concatenated.

On a CPU, one thread is used, and by default the process keeps the memory that it frees. Otherwise glibc returns large
blocks to the system and requests them again, page by page. That takes longer than normalizing their content, and
whether it happens depends on earlier allocations. `--fresh-memory` measures this default of glibc.

On a GPU, each contestant also runs with a ReLU after it, and on maps of ResNet-50. A turn ends when the GPU has
finished. Statistics are taken at the end of a turn, like at the end of an update in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.turns import print_rates, synchronize, take_turns
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
from hvd_batchgrow.nn.ghost.ghost_choice import by_pytorch_only, kernels_for_cpu
from hvd_batchgrow.train.malloc_tuning import keep_freed_memory

SIDES, LAYOUTS = (32, 8), (torch.contiguous_format, torch.channels_last)
RESNET_MAPS = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
"""Channels and side of ResNet-50's widest maps."""
VALUES_A_TURN = {"cpu": 2**24, "cuda": 2**30}


class ChunkLoop(nn.BatchNorm2d):
    """A batch norm that normalizes ghost batches in a loop."""

    def __init__(self, num_features: int, ghost_batch: int) -> None:
        super().__init__(num_features)
        self.ghost_batch = ghost_batch

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each ghost batch, and concatenate the outputs."""
        return torch.cat([super(ChunkLoop, self).forward(chunk) for chunk in x.split(self.ghost_batch)])


class Plain(nn.Module):
    """A ghost norm that always uses PyTorch's operations."""

    def __init__(self, norm: GhostBatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by PyTorch's operations."""
        with by_pytorch_only():
            return self.norm(x)  # type: ignore[no-any-return]


def contestant(norm: nn.Module, x: Tensor) -> Callable[[], int]:
    """Return a contestant that does some forwards and backwards of an input."""
    inputs, upstream = x.clone().requires_grad_(), torch.randn_like(x)
    wanted = [inputs, *norm.parameters()]
    repeats = max(1, VALUES_A_TURN[x.device.type] // x.numel())
    deferred = [module for module in norm.modules() if isinstance(module, GhostBatchNorm2d) and module.deferred]

    def run() -> int:
        for _ in range(repeats):
            torch.autograd.grad(norm(inputs), wanted, upstream)
        for module in deferred:
            module.take_statistics()
        synchronize(x.device)
        return repeats * len(x)

    return run


def on_cpu(channels: int, ghost_batch: int) -> dict[str, nn.Module]:
    """Return the contestants on a CPU."""
    norms: dict[str, nn.Module] = {
        "nn.BatchNorm2d": nn.BatchNorm2d(channels),
        "loop over ghost batches": ChunkLoop(channels, ghost_batch),
        "hvd_batchgrow, PyTorch": Plain(GhostBatchNorm2d(channels, ghost_batch)),
    }
    if kernels_for_cpu() == "C":
        norms["hvd_batchgrow, C"] = GhostBatchNorm2d(channels, ghost_batch)
    return norms


def on_gpu(channels: int, ghost_batch: int) -> dict[str, nn.Module]:
    """Return the contestants on a GPU."""

    def ours(*, relu: bool) -> GhostBatchNorm2d:
        norm = GhostBatchNorm2d(channels, ghost_batch, relu=relu)
        norm.deferred = True
        return norm

    norms: dict[str, nn.Module] = {}
    for relu, name in ((False, ""), (True, " + ReLU")):
        after = [nn.ReLU(inplace=True)] if relu else []
        norms[f"nn.BatchNorm2d{name}"] = nn.Sequential(nn.BatchNorm2d(channels), *after)
        norms[f"loop over ghost batches{name}"] = nn.Sequential(ChunkLoop(channels, ghost_batch), *after)
        norms[f"hvd_batchgrow, PyTorch{name}"] = Plain(ours(relu=relu))
        if find_spec("triton") is not None:
            norms[f"hvd_batchgrow, Triton{name}"] = ours(relu=relu)
    return norms


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--ghost-batch", type=int, default=32)
    parser.add_argument("--fresh-memory", action="store_true", help="on a CPU: let glibc return freed memory")
    arguments = parser.parse_args()
    if arguments.samples % arguments.ghost_batch:
        parser.error(f"{arguments.samples} samples are not a multiple of a ghost batch of {arguments.ghost_batch}")
    if arguments.device == "cuda" and arguments.fresh_memory:
        parser.error("--fresh-memory is for the CPU: PyTorch keeps a GPU's memory")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch found no GPU")
    return arguments


def inputs(arguments: argparse.Namespace) -> Iterator[Tensor]:
    """Yield the inputs."""
    maps = [(arguments.channels, side) for side in SIDES]
    for channels, side in (*maps, *(RESNET_MAPS if arguments.device == "cuda" else ())):
        x = torch.randn(arguments.samples, channels, side, side, device=arguments.device)
        for layout in LAYOUTS:
            yield x.to(dtype=getattr(torch, arguments.dtype), memory_format=layout)


def main() -> None:
    """Time the contestants in turns, for each shape."""
    arguments = parse()
    if arguments.device == "cpu" and not arguments.fresh_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU, one thread"
    for x in inputs(arguments):
        norms = (on_gpu if x.is_cuda else on_cpu)(x.shape[1], arguments.ghost_batch)
        layout = "contiguous" if x.is_contiguous() else "channels_last"
        print(f"\n{device}, {tuple(x.shape)}, {arguments.dtype}, ghost batches of {arguments.ghost_batch}, {layout}")
        contestants = {name: contestant(norm.to(x.device), x) for name, norm in norms.items()}
        print_rates(take_turns(contestants, arguments.turns), "samples/s", "nn.BatchNorm2d")


if __name__ == "__main__":
    main()
