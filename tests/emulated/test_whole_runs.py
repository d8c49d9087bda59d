"""Whole runs on an emulated accelerator: the weights of the CPU, and how often the host waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import ChecksSection, Job
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.nn.ghost.ghost_choice import by_pytorch_only
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths
from hvd_batchgrow.train.events import Observer
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.probe import _Bench, _time_block, _time_sum
from hvd_batchgrow.train.trainer import Trainer
from tests.emulated.device import Event, waits
from tests.helpers import measured_job, small_job, small_source
from tests.training import Recorder, StopAfter, digest

CPU = torch.device("cpu")
NEVER = StopAfter(10**9, here=True)
NOISE = {"measure": True, "per_layer_group": True}
LARS = {"name": "lars", "lr": 1.0}
SHORT = {"epochs": 1.1, "boundaries_epochs": [0.25, 0.5, 0.75]}
GROWTH = {"policy": "grow", "epochs": 1, "boundaries_epochs": [0.5], "noise_factor": 2.0}
EXACT = {"exact": True, "max_micro_batch": 8}


def dropout_job() -> Job:
    """WRN-16-4 with dropout, in channels_last."""
    return parse_job(
        {
            "name": "wrn",
            "data": {
                **{"source": "synthetic_images", "num_samples": 48, "shape": [8, 8, 3], "num_classes": 4},
                **{"crop_padding": 2, "hflip": True, "channels_last": True, "pipeline": "torch"},
            },
            "model": {"name": "wrn_16_4", "ghost_batch": 8, "dropout": 0.3},
            "optim": {"name": "sgd", "lr": 0.05},
            "schedule": {**GROWTH, "global_batch": 8, "max_batch": 16},
            "layout": {"max_micro_batch": 16, "threads_per_rank": 1},
        }
    )


def residual_job() -> Job:
    """A ResNet with ShakeDrop and a Hadamard classifier."""
    return short_job(model={"name": "resnet8", "channels": None, "shakedrop": 0.5, "classifier": "hadamard"})


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
    evaluation, schedule = {"every_epochs": 0.25}, {"epochs": 2.0}
    return measured_job(trigger, evaluation=evaluation, update={"ema_samples": 100.0}, schedule=schedule)


def short_job(**sections: Any) -> Job:
    """A small job of four phases."""
    return small_job(schedule=SHORT, **sections)


def partly_used_job() -> Job:
    """A network with parameters that no loss reaches."""
    model = {"name": "tests.emulated.networks:partly_used", "channels": None}
    return short_job(model=model)


JOBS: dict[str, tuple[Callable[[], Job], int]] = {
    "sgd": (short_job, 1),
    "nesterov": (lambda: short_job(optim={"nesterov": True, "rescale_momentum": True}), 1),
    "adamw": (lambda: short_job(optim={"name": "adamw", "lr": 1e-3, "momentum": None}), 1),
    "lars": (lambda: short_job(optim=LARS), 1),
    "clipping, averaged weights, smoothed labels": (
        lambda: short_job(update={"clip_norm": 0.5, "ema_samples": 100.0}, task={"label_smoothing": 0.1}),
        1,
    ),
    "exact": (lambda: short_job(layout=EXACT), 1),
    "noise": (lambda: short_job(gradient_noise=NOISE), 2),
    "noise of norm layers": (lambda: short_job(gradient_noise={"measure": True, "estimator": "norm_layers"}), 2),
    "exact, noise, clipping, lars": (
        lambda: short_job(optim=LARS, layout=EXACT, gradient_noise=NOISE, update={"clip_norm": 0.5}),
        2,
    ),
    "precise running statistics": (lambda: short_job(model={"precise_bn_samples": 64}), 1),
    "dropout, channels_last": (dropout_job, 1),
    "ShakeDrop and a Hadamard classifier": (residual_job, 1),
    "rows": (rows_job, 1),
    "plateau": (plateau_job, 1),
    "bfloat16": (lambda: short_job(update={"precision": "bfloat16"}), 1),
    "float16": (lambda: short_job(update={"precision": "float16"}), 1),
    "preconditioned noise": (
        lambda: short_job(
            optim={"name": "adam", "lr": 1e-3, "momentum": None},
            gradient_noise={"measure": True, "preconditioned": True},
        ),
        2,
    ),
    "partly used": (partly_used_job, 2),
}


def trainer_of(job: Job, device: torch.device, folder: Path, *observers: Observer) -> Trainer:
    (folder / "checkpoints").mkdir(parents=True)
    is_synthetic = job.data.source.startswith("synthetic")
    source = load_source(job.data, job.seed, lambda *_: None) if is_synthetic else small_source()
    plan = compile_plan(job, 1, len(source.train))
    return Trainer(TrainingParts(job, source, SingleRank(), device), plan, SingleRank(), folder, observers)


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
    checkpoint = Checkpoint.from_bytes(checkpoint_paths(tmp_path / "device" / "checkpoints")[0].read_bytes())
    assert 0 < checkpoint.samples < ended.samples
    resumed = trainer_of(make(), device, tmp_path / "resumed")
    resumed.run(NEVER, checkpoint)
    assert digest(resumed) == digest(on_device)


@pytest.mark.parametrize("name", ["adamw", "exact", "noise of norm layers", "float16", "partly used"])
def test_replay_checks_pass_and_change_nothing(device: torch.device, name: str, tmp_path: Path) -> None:
    plain = JOBS[name][0]()
    checked = plain.model_copy(update={"checks": ChecksSection(replay_every=1)})
    without, with_checks = trainer_of(plain, device, tmp_path / "0"), trainer_of(checked, device, tmp_path / "1")
    without.run(NEVER)
    updates = with_checks.run(NEVER).updates
    assert digest(with_checks) == digest(without)
    assert with_checks.state.replays.identical == updates - with_checks.state.num_skipped > 0


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


def test_the_times_of_updates_are_read_once_per_record(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Counter[str]()
    synchronize = Event.synchronize

    def counted(event: Event) -> None:
        reads["synchronize"] += 1
        synchronize(event)

    monkeypatch.setattr(Event, "synchronize", counted)
    recorder = Recorder()
    trainer = trainer_of(short_job(layout={"max_micro_batch": 8}), device, tmp_path / "device", recorder)
    updates = trainer.run(NEVER).updates
    assert 1 < len(recorder.records) < updates
    assert reads["synchronize"] == len(recorder.records)
    for record in recorder.records:
        shares = (record.data_wait_pct, record.backward_pct, record.allreduce_pct, record.optimizer_pct)
        assert all(0 < share < 100 for share in shares)
        assert sum(shares) < 100


def test_a_probe_waits_for_the_device_before_and_after_what_it_times(device: torch.device, tmp_path: Path) -> None:
    trainer = trainer_of(short_job(layout={"max_micro_batch": 8}), device, tmp_path)
    bench = _Bench(trainer.parts, trainer.plan.schedule.phases[0], SingleRank())
    bench.update(8, 2)
    waits.clear()
    seconds, data_wait_s = _time_block(bench, 8, 2)
    assert 0 < data_wait_s < seconds
    num_updates = 4 // 2
    events = sum(count for line, count in waits.items() if line.endswith("event"))
    assert (events, waits.total()) == (2, 2 + num_updates)
    waits.clear()
    assert _time_sum(bench, 1000).seconds > 0
    assert {line.rpartition(" ")[2] for line in waits} == {"event"}
