"""Whole runs on an emulated accelerator: the weights of the CPU, and how often the host waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.nn.ghost.ghost_choice import by_pytorch_only
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.checkpoints.checkpoint import newest_good
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.trainer import Trainer
from tests.emulated import device as emulated
from tests.emulated.device import MixedDevicesError, launches, waits
from tests.helpers import measured_job, small_job, small_source
from tests.training import StopAfter, digest

CPU = torch.device("cpu")
NEVER = StopAfter(10**9, here=True)
NOISE = {"measure": True, "per_layer_group": True}
LARS = {"name": "lars", "lr": 1.0}
GROWTH = {"policy": "grow", "epochs": 1, "boundaries_epochs": [0.5], "noise_factor": 2.0}
EXACT = {"exact": True, "max_micro_batch": 8}


@pytest.fixture
def device() -> Iterator[torch.device]:
    with emulated.emulated_device() as device:
        yield device


def dropout_job() -> Job:
    """WRN-16-4 with dropout, in channels_last."""
    return parse_job(
        {
            "name": "wrn",
            "data": {
                **{"source": "synthetic_images", "num_samples": 48, "shape": [16, 16, 3], "num_classes": 4},
                **{"crop_padding": 2, "hflip": True, "channels_last": True, "pipeline": "torch"},
            },
            "model": {"name": "wrn_16_4", "ghost_batch": 8, "dropout": 0.3},
            "optim": {"name": "sgd", "lr": 0.05},
            "schedule": {**GROWTH, "global_batch": 8, "max_batch": 16},
            "layout": {"max_micro_batch": 16, "threads_per_rank": 1},
        }
    )


def rows_job() -> Job:
    """A dense network on rows, with AdamW."""
    return parse_job(
        {
            "name": "rows",
            "data": {"source": "synthetic_rows", "num_samples": 256},
            "model": {"name": "dense7", "ghost_batch": 16},
            "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-2},
            "schedule": {**GROWTH, "global_batch": 32, "max_batch": 64},
            "layout": {"max_micro_batch": 32, "threads_per_rank": 1},
        }
    )


def plateau_job() -> Job:
    """A trigger that restores the best weights, and averaged weights."""
    trigger = {"name": "plateau", "patience_epochs": 0.5, "restore_best": True, "noise_factor": 2.0}
    return measured_job(trigger, evaluation={"every_epochs": 0.25}, update={"ema_samples": 100.0})


JOBS: dict[str, tuple[Callable[[], Job], int]] = {
    "sgd": (small_job, 1),
    "nesterov": (lambda: small_job(optim={"nesterov": True, "rescale_momentum": True}), 1),
    "adamw": (lambda: small_job(optim={"name": "adamw", "lr": 1e-3, "momentum": None}), 1),
    "lars": (lambda: small_job(optim=LARS), 1),
    "clipping, averaged weights, smoothed labels": (
        lambda: small_job(update={"clip_norm": 0.5, "ema_samples": 100.0, "label_smoothing": 0.1}),
        1,
    ),
    "exact": (lambda: small_job(layout=EXACT), 1),
    "noise": (lambda: small_job(gradient_noise=NOISE), 2),
    "exact, noise, clipping, lars": (
        lambda: small_job(optim=LARS, layout=EXACT, gradient_noise=NOISE, update={"clip_norm": 0.5}),
        2,
    ),
    "precise running statistics": (lambda: small_job(model={"precise_bn_samples": 64}), 1),
    "dropout, channels_last": (dropout_job, 1),
    "rows": (rows_job, 1),
    "plateau": (plateau_job, 1),
}


def trainer_of(job: Job, device: torch.device, folder: Path) -> Trainer:
    (folder / "checkpoints").mkdir(parents=True)
    is_synthetic = job.data.source.startswith("synthetic")
    source = load_source(job.data, job.seed, lambda *_: None) if is_synthetic else small_source()
    plan = compile_plan(job, 1, len(source.train))
    return Trainer(TrainingParts(job, source, SingleRank(), device), plan, SingleRank(), folder, [])


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in trainer.parts.model.state_dict().items()}


@pytest.mark.parametrize("name", JOBS)
def test_a_run_has_the_weights_of_the_cpu_and_resumes_bit_identically(
    device: torch.device, name: str, tmp_path: Path
) -> None:
    make, _ = JOBS[name]
    on_cpu, on_device = trainer_of(make(), CPU, tmp_path / "cpu"), trainer_of(make(), device, tmp_path / "device")
    with by_pytorch_only():  # as on the device
        ended = on_cpu.run(NEVER)
    assert on_device.run(NEVER).updates == ended.updates
    for key, value in state(on_cpu).items():
        torch.testing.assert_close(state(on_device)[key], value, rtol=1e-4, atol=1e-5, msg=key)
    trainer_of(make(), device, tmp_path / "part").run(StopAfter(max(1, ended.updates // 2), here=True))
    checkpoint, _ = newest_good(tmp_path / "part" / "checkpoints")
    resumed = trainer_of(make(), device, tmp_path / "resumed")
    resumed.run(NEVER, checkpoint)
    assert digest(resumed) == digest(on_device)


@pytest.mark.parametrize("name", JOBS)
def test_the_host_waits_once_per_update_and_never_in_a_pass(device: torch.device, name: str, tmp_path: Path) -> None:
    make, expected = JOBS[name]
    trainer = trainer_of(make(), device, tmp_path / "device")
    engine, seen = trainer.parts.engine, set[int]()
    if trainer.state.growth.measures_noise:
        engine.measure_noise(per_layer_group=True)
    update = engine.update

    def counted(*arguments: Any, **options: Any) -> Any:
        waits.clear()
        result = update(*arguments, **options)
        seen.add(waits.total())
        return result

    engine.update = counted  # type: ignore[method-assign]
    groups = trainer.parts.ghost_batches(0, SingleRank())
    phases = trainer.plan.schedule.phases
    micro_batch = trainer.job.model.ghost_batch
    trainer.update(groups, phases[0], micro_batch)  # makes what later updates keep, such as constants on the device
    seen.clear()
    for phase in phases:
        trainer.update(groups, phase, micro_batch)
    assert max(phase.global_batch for phase in phases) > micro_batch, "some updates have several passes"
    assert seen == {expected}, waits


def test_an_update_launches_little_beside_its_passes_and_its_optimizer_step(
    device: torch.device, tmp_path: Path
) -> None:
    """Forward, backward (which `_compute` calls) and the optimizer's step are not counted."""
    trainer = trainer_of(dropout_job(), device, tmp_path / "device")
    groups, phase = trainer.parts.ghost_batches(0, SingleRank()), trainer.plan.schedule.phases[-1]
    trainer.update(groups, phase, 8)
    launches.clear()
    trainer.update(groups, phase, 8)
    beside = {
        line: count
        for line, count in launches.items()
        if line.startswith(("train/update/", "nn/ghost/norm_group"))
        and not line.split()[1].startswith(("forward", "_compute", "update:"))
    }
    assert sum(beside.values()) <= 60, beside


def test_an_operation_on_both_devices_is_an_error(device: torch.device) -> None:
    with pytest.raises(MixedDevicesError, match=r"emulated:0 and a CPU tensor of shape \(2, 3\)"):
        torch.zeros(2, 3, device=device) + torch.zeros(2, 3)
    assert (torch.ones(2, device=device) * torch.tensor(2.0)).tolist() == [2.0, 2.0]


def test_what_makes_the_host_wait_is_counted(device: torch.device) -> None:
    host = torch.arange(3.0)
    waits.clear()
    values = host.pin_memory().to(device, non_blocking=True)
    nn.functional.relu(values).sum()
    assert not waits
    for reads in (
        lambda: values.sum().item(),
        values.tolist,
        values.cpu,
        lambda: bool(values.any()),
        lambda: values[values > 0],
        lambda: host.to(device),
        lambda: host.to(device, non_blocking=True),
    ):
        waits.clear()
        reads()
        assert waits.total() == 1
