"""The networks and data of the rows that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.contestants import job_of, with_batch_norm
from hvd_batchgrow.config import Job
from hvd_batchgrow.nn.build import build_model

MICRO_BATCH = 64


@dataclass(frozen=True)
class Case:
    """A network and its data."""

    title: str
    model: dict[str, Any]
    data: dict[str, Any]
    shape: tuple[int, int, int]
    """(H, W, C) of an image."""
    batches: tuple[tuple[int, int], ...]
    """Global batches, each with the updates of a turn."""


def case_of(name: str, *, is_tiny: bool) -> Case:
    """Return a case: "wrn" is WRN-16-4 on generated images, "small" the network of the quickstart on Fashion-MNIST."""
    generated = {"source": "synthetic_images", "num_samples": 5000}
    if name == "wrn":
        network, side = ("wrn_10_1", 16) if is_tiny else ("wrn_16_4", 32)
        data = generated | {"shape": [side, side, 3], "crop_padding": 4, "hflip": True}
        batches = ((128, 1),) if is_tiny else ((128, 1), (256, 1))
        return Case(network, {"name": network, "ghost_batch": MICRO_BATCH}, data, (side, side, 3), batches)
    model = {"name": "small_conv_net", "channels": [16, 32, 64, 128, 128], "ghost_batch": MICRO_BATCH}
    own = generated | {"shape": [28, 28, 1]} if is_tiny else {"source": "fashion_mnist"}
    data = own | {"crop_padding": 2, "hflip": True}
    return Case("small_conv_net", model, data, (28, 28, 1), ((128, 2),) if is_tiny else ((128, 25), (3200, 1)))


def job_of_case(case: Case, batch: int, **sections: dict[str, Any]) -> Job:
    """Return the job of a case with a global batch, on a CPU with one thread per rank."""
    layout = {"max_micro_batch": MICRO_BATCH, "threads_per_rank": 1, **sections.pop("layout", {})}
    return job_of("benchmark", "cpu", batch, data=case.data, model=case.model, layout=layout, **sections)


def network_by_hand(case: Case) -> nn.Module:
    """Return the network of a case with nn.BatchNorm2d."""
    return with_batch_norm(build_model(job_of_case(case, 128), case.shape, 10))
