"""Measure updates/s of all weights of ResNet-50 by SGD and by LARS.

python -m benchmarks.lars [--turns 15] [--threads 1] [--device cuda]

The contestants are this package's LARS; torch's SGD, whose update LARS scales, in its three forms; and both variants of
timm's LARS if timm is installed (pip install --no-deps timm), else a loop over the tensors that follows the formulas.
All use momentum and weight decay. A turn ends when the GPU has finished.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.turns import print_rates, synchronize, take_turns
from hvd_batchgrow.optim.lars import Lars

UPDATES, LR, MOMENTUM, WEIGHT_DECAY = {"cpu": 5, "cuda": 50}, 0.1, 0.9, 5e-5


def resnet50_shapes(num_classes: int = 1000) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of ResNet-50 in order (He et al. 2016, arXiv 1512.03385, table 1)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for inner, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(num_blocks):
            convolutions = [(inner, width, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)]
            if block == 0:  # the shortcut
                convolutions.append((4 * inner, width, 1, 1))
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]  # weight and bias of the norm that follows
            width = 4 * inner
    return [*shapes, (num_classes, width), (num_classes,)]


def make_parameters(device: torch.device) -> list[nn.Parameter]:
    """Return random parameters of ResNet-50's shapes with random gradients."""
    shapes = resnet50_shapes()
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032
    assert len(shapes) == 161
    return random_parameters(shapes, device)


def random_parameters(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    """Return random parameters of some shapes with random gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter((0.05 * torch.randn(shape, generator=generator)).to(device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = (1e-3 * torch.randn(parameter.shape, generator=generator)).to(device)
    return parameters


def in_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Return parameter groups with weight decay, and so scaling, for parameters of more than one dimension."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def timm_lars() -> Callable[..., torch.optim.Optimizer] | None:
    """Return timm's LARS, or None without timm. Only its optimizers are imported: the package needs torchvision."""
    spec = find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        return None
    package = sys.modules.setdefault("_timm_optim", ModuleType("_timm_optim"))
    package.__path__ = [f"{folder}/optim" for folder in spec.submodule_search_locations]
    return importlib.import_module("_timm_optim.lars").Lars  # type: ignore[no-any-return]


@torch.no_grad()
def loop(parameters: list[nn.Parameter], buffers: list[Tensor]) -> None:
    """LARS tensor by tensor, from the formulas."""
    for parameter, buffer in zip(parameters, buffers, strict=True):
        gradient = parameter.grad
        assert gradient is not None
        if parameter.ndim <= 1:
            buffer.mul_(MOMENTUM).add_(gradient, alpha=LR)
        else:
            size = parameter.norm()
            ratio = 0.001 * size / (gradient.norm() + WEIGHT_DECAY * size)
            decayed = gradient.add(parameter, alpha=WEIGHT_DECAY).mul_(LR * ratio)
            buffer.mul_(MOMENTUM).add_(decayed)
        parameter.sub_(buffer)


REFERENCE = "torch SGD"
"""As torch chooses: on a CPU a loop over the tensors, on a GPU foreach."""


def contestant(update: Callable[[], object], device: torch.device) -> Callable[[], int]:
    """Return a contestant that does some updates."""
    num_updates = UPDATES[device.type]

    def work() -> int:
        for _ in range(num_updates):
            update()
        synchronize(device)
        return num_updates

    return work


def contestants(device: torch.device) -> dict[str, Callable[[], int]]:
    """Return the contestants for a device."""
    optimizers: dict[str, Any] = {
        REFERENCE: torch.optim.SGD(in_groups(make_parameters(device)), LR, MOMENTUM),
        "torch SGD, foreach": torch.optim.SGD(in_groups(make_parameters(device)), LR, MOMENTUM, foreach=True),
        "torch SGD, fused": torch.optim.SGD(in_groups(make_parameters(device)), LR, MOMENTUM, fused=True),
        "hvd_batchgrow Lars": Lars(in_groups(make_parameters(device)), LR, MOMENTUM),
    }
    if (timm := timm_lars()) is not None:
        values: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM}
        optimizers["timm Lars, foreach"] = timm(in_groups(make_parameters(device)), **values, foreach=True)
        optimizers["timm Lars, loop"] = timm(in_groups(make_parameters(device)), **values, foreach=False)
    found = {name: contestant(optimizer.step, device) for name, optimizer in optimizers.items()}
    if timm is None:
        parameters = make_parameters(device)
        buffers = [torch.zeros_like(parameter) for parameter in parameters]
        found["loop over the tensors"] = contestant(lambda: loop(parameters, buffers), device)
    return found


def main() -> None:
    """Time the contestants in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    print_rates(take_turns(contestants(device), arguments.turns), "updates/s", REFERENCE)


if __name__ == "__main__":
    main()
