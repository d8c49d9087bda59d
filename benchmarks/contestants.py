"""Training loops that take turns: the update engine of this package, and a bare loop in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.turns import synchronize
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.order.stream import micro_batches_of_rank
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.setup import prepare_rank
from hvd_batchgrow.train.update.forward import MicroBatch, autocast
from hvd_batchgrow.train.update.micro_batches import read_micro_batches

LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4
"""A small learning rate: the same random samples again and again must not make the loss infinite."""

CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor]


def job_of(name: str, device: str, batch: int, **sections: dict[str, Any]) -> Job:
    """Return a job that trains an endless phase with one global batch.

    Args:
        name: of the job.
        device: "cuda" or "cpu".
        batch: B, the samples of an update.
        sections: of the job file; `data`, `model` and, if B is to be split, `layout`.
    """
    layout = {"device": device, "max_micro_batch": batch, **sections.pop("layout", {})}
    tree = {
        "name": name,
        "optim": {"name": "sgd", "lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY},
        "schedule": {
            "policy": "grow", "epochs": 1000.0, "global_batch": batch, "max_batch": batch,
            "boundaries_epochs": [], "noise_factor": 2.0,
        },
        "layout": layout,
        **sections,
    }  # fmt: skip
    return parse_job(tree)


class Ours:
    """A job's parts on this rank, without its run folder."""

    def __init__(self, job: Job, ranks: Ranks, source: Datasets | None = None) -> None:
        self.source = source or load_source(job.data, job.seed, lambda *_: None)
        prepare_rank(job, ranks)
        self.device = torch.device("cuda", torch.cuda.current_device()) if job.layout.device == "cuda" else CPU
        self.job, self.ranks = job, ranks
        self.parts = TrainingParts(job, self.source, ranks, self.device)
        plan = compile_plan(job, ranks.size, len(self.source.train))
        self.phase, self.micro_batch = plan.schedule.phases[0], plan.layouts[0].micro_batch
        self.batch, self.group = self.phase.global_batch, job.model.ghost_batch
        self._samples = 0
        self._ghost_batches = self.parts.ghost_batches(0, ranks, lambda _: self.micro_batch // self.group)

    def next_passes(self) -> list[tuple[int, ...]]:
        """Return the slots of each micro-batch of this rank in the next update."""
        samples, self._samples = self._samples, self._samples + self.batch
        return micro_batches_of_rank(
            samples, self.batch, self.group, self.micro_batch, self.ranks.rank, self.ranks.size
        )

    def update(self, micro_batches: Iterator[MicroBatch], num_micro_batches: int) -> None:
        """Do an update."""
        self.parts.engine.update(micro_batches, num_micro_batches, self.phase, self.batch // self.group)

    def reading(self, num_updates: int) -> Callable[[], int]:
        """Return a contestant that reads its samples as training does, and returns the number of all ranks' samples."""

        def work() -> int:
            for _ in range(num_updates):
                passes = self.next_passes()
                self.update(
                    read_micro_batches(self._ghost_batches, passes, self.parts.keyed_by, lambda stage: None),
                    len(passes),
                )
            synchronize(self.device)
            return num_updates * self.batch

        return work

    def repeating(self, inputs: Tensor, labels: Tensor, num_updates: int) -> Callable[[], int]:
        """Return a contestant whose micro-batches are all the same samples, which are on the device already."""

        def work() -> int:
            for _ in range(num_updates):
                passes = self.next_passes()
                self.update((MicroBatch(inputs, labels, slots) for slots in passes), len(passes))
            synchronize(self.device)
            return num_updates * self.batch

        return work


def bare(network: nn.Module, batches: Iterator[Batch], precision: str, num_updates: int) -> Callable[[], int]:
    """Return a contestant that trains as an experienced user of PyTorch would, with nothing that can be dispensed with.

    Args:
        network: on its device, with nn.BatchNorm2d.
        batches: inputs and labels of an update, on the same device.
        precision: of autocast; "float32" and "tf32" need no autocast.
        num_updates: of a turn.
    """
    device = next(network.parameters()).device
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    network.train()

    def work() -> int:
        num_samples = 0
        for inputs, labels in itertools.islice(batches, num_updates):
            with autocast(device, precision):
                logits = network(inputs)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            num_samples += len(inputs)
        synchronize(device)
        return num_samples

    return work


def random_batch(
    shape: tuple[int, int, int, int], num_classes: int, device: torch.device, *, channels_last: bool
) -> Batch:
    """Return images (n, C, H, W) and labels (n,) on a device."""
    images = torch.randn(shape).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return images.to(device), torch.randint(num_classes, shape[:1]).to(device)


def with_batch_norm(network: nn.Module) -> nn.Module:
    """Replace the ghost norms of a network by nn.BatchNorm2d, in place, and return it."""
    for name, child in network.named_children():
        if isinstance(child, GhostBatchNorm2d):
            norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
            setattr(network, name, nn.Sequential(norm, nn.ReLU(inplace=True)) if child.relu else norm)
        else:
            with_batch_norm(child)
    return network
