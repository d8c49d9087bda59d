"""How many kernels an update launches on an emulated accelerator, and a bare training loop with the same optimizer.

Counts do not depend on the sizes of the tensors, which are small here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
from hvd_batchgrow.nn.keyed_random import sample_keys
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch
from tests.emulated.device import launches

NETWORKS: dict[str, dict[str, Any]] = {
    "small_conv_net": {"channels": [4, 8]},
    "wrn_16_4": {},
    "torchvision.models:resnet50": {},
}
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
    {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-2},
    {"name": "lars", "lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4},
)
BATCH, GROUP = 4, 2


def job_of(network: str, optim: dict[str, Any], **keys: Any) -> Job:
    return parse_job(
        {
            "name": "launches",
            "data": {
                **{"source": "synthetic_images", "num_samples": 48, "shape": [32, 32, 3], "num_classes": 4},
                "pipeline": "torch",
            },
            "model": {"name": network, "ghost_batch": GROUP, **NETWORKS[network], **keys},
            "optim": optim,
            "schedule": {"policy": "decay", "epochs": 1, "boundaries_epochs": [], "global_batch": BATCH},
            "layout": {"max_micro_batch": BATCH, "threads_per_rank": 1},
        }
    )


def engine_of(job: Job, device: torch.device) -> UpdateEngine:
    model = build_model(job, (32, 32, 3), 4).to(device)
    return UpdateEngine(model, build_optimizer(model, job.optim), SingleRank())


def samples(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.rand(BATCH, 3, 32, 32).to(device), torch.zeros(BATCH, dtype=torch.int64).to(device)


def of_update(engine: UpdateEngine) -> tuple[Counter[str], Counter[str]]:
    """Count the launches of an update: its passes, and all else."""
    keys = sample_keys(1, np.zeros(BATCH, dtype=np.int64), np.arange(BATCH))
    micro_batch = MicroBatch(*samples(engine.device), tuple(range(BATCH // GROUP)), keys=keys)
    phase = Phase(0.0, 0.1, 0.9, BATCH, BATCH, start_samples=0, num_updates=10)
    for _ in range(2):  # the first update makes the optimizer's state
        launches.clear()
        engine.update(iter([micro_batch]), 1, phase, BATCH // GROUP)
    passes = Counter({line: count for line, count in launches.items() if is_of_pass(line)})
    return passes, launches - passes


def is_of_pass(line: str) -> bool:
    """Whether a line is of a forward or backward pass, including the loss; `_accumulate` calls `backward`."""
    is_network = line.startswith("nn/") and not line.startswith("nn/ghost/norm_group")
    return is_network or line.startswith("tasks/") or line.split()[1].startswith(("forward", "_accumulate"))


def of_bare_loops(model: nn.Module, device: torch.device, jobs: list[Job]) -> Iterator[tuple[int, int]]:
    """For the optimizer of each job, count the launches of the passes and of all else, with torch's batch norms."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, GhostBatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(child.num_features).to(device))
    inputs, labels = samples(device)
    total = torch.zeros((), device=device)
    for job in jobs:
        optimizer = build_optimizer(model, job.optim)
        for _ in range(2):
            optimizer.zero_grad()
            launches.clear()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            passes = launches.total()
            total += loss.detach()
            optimizer.step()
        yield passes, launches.total() - passes


@pytest.mark.parametrize("network", NETWORKS)
def test_an_update_launches_hardly_more_than_a_bare_loop(device: torch.device, network: str) -> None:
    jobs = [job_of(network, optim) for optim in OPTIMIZERS]
    engine = engine_of(jobs[0], device)
    model, found = engine.model, []
    for job in jobs:
        engine.optimizer = build_optimizer(model, job.optim)
        found.append(of_update(engine)[1])
    for job, beside, (passes, bare) in zip(jobs, found, of_bare_loops(model, device, jobs), strict=True):
        of_step = sum(count for line, count in beside.items() if line.startswith("optim/") or " update: _f" in line)
        ratio = (passes + beside.total()) / (passes + bare)
        report = f"{job.optim.name}: {passes} in the passes, beside them {bare} and {beside.total()}, {ratio:.2f}"
        print(network, report)
        # The number does not grow with the network, so the smallest network has the largest ratio.
        assert beside.total() - of_step <= 17, (report, beside)
        assert ratio <= 1.2 or network == "small_conv_net", (report, beside)


def test_keyed_dropout_launches_few_kernels_per_layer(device: torch.device) -> None:
    """torch's own dropout launches one: its generator is a part of the kernel."""
    engine = engine_of(job_of("wrn_16_4", OPTIMIZERS[0], dropout=0.3), device)
    passes, _ = of_update(engine)
    num_layers = len(engine.keyed_modules)
    per_layer = (
        sum(count for line, count in passes.items() if line.startswith(("nn/dropout", "nn/keyed_random"))) / num_layers
    )
    assert num_layers == 6
    assert per_layer <= 16, passes
