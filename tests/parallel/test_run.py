"""Whole runs through the trainer: which samples they use, and what a stop does to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.data.datasets.dataset import ArrayDataset
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.forward import MicroBatch
from tests.helpers import NUM_TRAIN, small_job, small_source
from tests.training import Recorder, StopAfter, digest, newest, train


@pytest.mark.parametrize("pipeline", ["dali", "torch"])
def test_each_sample_once_an_epoch_across_growth_in_mid_epoch(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: str
) -> None:
    source = small_source()
    # Without augmentation an image identifies its sample: make all images different in their first pixels.
    ids = np.arange(NUM_TRAIN)
    assert isinstance(source.train, ArrayDataset)
    source.train.values[:, 0, 0, 0], source.train.values[:, 0, 1, 0] = ids % 256, ids // 256
    used: list[tuple[int, int, int]] = []  # (update's first entry, position of the group, sample)
    update = UpdateEngine.update
    counter = {"samples": 0}

    def record(self: UpdateEngine, micro_batches: Iterator[MicroBatch], *args: Any, **kwargs: Any) -> UpdateResult:
        taken = list(micro_batches)
        for micro_batch in taken:
            pixels = torch.round((micro_batch.inputs[:, 0, 0, :2] * 0.25 + 0.5) * 255).long()
            for group, samples in zip(micro_batch.slots, pixels.split(8), strict=True):
                used.extend((counter["samples"], group, int(low + 256 * high)) for low, high in samples)
        counter["samples"] += args[1].global_batch
        return update(self, iter(taken), *args, **kwargs)

    monkeypatch.setattr(UpdateEngine, "update", record)
    job = small_job(data={"crop_padding": 0, "hflip": False, "pipeline": pipeline})
    trainer, ended = train(job, ranks, tmp_path, source=source)
    end = trainer.plan.schedule.end_samples
    assert ended.updates == ended.num_updates == trainer.plan.num_updates
    assert len({phase.global_batch for phase in trainer.plan.schedule.phases}) == 3
    seen = torch.zeros(-(-end // NUM_TRAIN), NUM_TRAIN, dtype=torch.int64)
    order = torch.full((end,), -1, dtype=torch.int64)
    for index, (first, group, sample) in enumerate(used):
        entry = first + 8 * group + index % 8
        seen[entry // NUM_TRAIN, sample] += 1
        order[entry] = sample
    ranks.all_reduce(seen, "seen")
    assert (seen[:-1] == 1).all()
    assert int(seen[-1].sum()) == end % NUM_TRAIN
    assert int(seen[-1].max()) == 1
    # Each rank saw its part of the one stream, at the places the stream gives them.
    stream = trainer.parts.stream.ids(0, end)
    mine = order >= 0
    assert (order[mine] == torch.from_numpy(stream)[mine]).all()


def test_the_plan_printed_is_the_plan_run(ranks: Ranks, tmp_path: Path) -> None:
    job, recorder = small_job(logging={"logs_per_epoch": NUM_TRAIN}), Recorder()
    trainer, ended = train(job, ranks, tmp_path, recorder)
    phases = trainer.plan.schedule.phases
    expected = [
        (phase.start_samples + (k + 1) * phase.global_batch, phase.lr, phase.global_batch)
        for phase in phases
        for k in range(phase.num_updates)
    ]
    assert [(r.samples, r.lr, r.global_batch) for r in recorder.records] == expected
    assert [r.updates for r in recorder.records] == list(range(1, ended.num_updates + 1))


def test_evaluation_is_over_every_test_sample(ranks: Ranks, tmp_path: Path) -> None:
    job, recorder = small_job(evaluation={"batch_size": 7, "every_epochs": 1.0}), Recorder()
    trainer, _ = train(job, ranks, tmp_path, recorder)
    schedule = trainer.plan.schedule
    ends = [
        phase.start_samples + (k + 1) * phase.global_batch
        for phase in schedule.phases
        for k in range(phase.num_updates)
    ]
    starts = [0, *ends[:-1]]
    due = [e for s, e in zip(starts, ends, strict=True) if e // 300 > s // 300 or e == schedule.end_samples]
    assert [e.samples for e in recorder.evaluations] == due
    test = small_source().test
    assert isinstance(test, ArrayDataset)
    images = (torch.from_numpy(test.values).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    trainer.parts.model.eval()
    with torch.no_grad():
        logits = trainer.parts.model(images)
    labels = torch.from_numpy(test.targets)
    assert recorder.evaluations[-1].metrics["top1"] == pytest.approx(
        (logits.argmax(1) == labels).double().mean().item()
    )
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert recorder.evaluations[-1].loss == pytest.approx(loss, rel=1e-5)


def test_the_records_average_over_every_sample(ranks: Ranks, tmp_path: Path) -> None:
    # Under 1 record an update and under 1 an epoch the same samples are averaged.
    fine, coarse = Recorder(), Recorder()
    train(small_job(logging={"logs_per_epoch": NUM_TRAIN}), ranks, tmp_path / "fine", fine)
    train(small_job(logging={"logs_per_epoch": 1}), ranks, tmp_path / "coarse", coarse)
    first = coarse.records[0]
    inside = [r for r in fine.records if r.samples <= first.samples]
    mean = sum(r.loss * r.global_batch for r in inside) / sum(r.global_batch for r in inside)
    assert first.loss == pytest.approx(mean, rel=1e-6)


def _num_updates(ranks: int) -> int:
    plan: Plan = compile_plan(small_job(), ranks, NUM_TRAIN)
    return plan.num_updates


@pytest.mark.parametrize("updates", range(1, _num_updates(1)))
def test_a_run_stopped_after_any_update_ends_with_the_same_weights(ranks: Ranks, tmp_path: Path, updates: int) -> None:
    # (b): batch, accumulation, momentum, running statistics and stream position all come back
    job = small_job(evaluation={"every_epochs": 3.0}, checkpoint={"every_epochs": 3.0}, data={"pipeline": "torch"})
    whole, _ = train(job, ranks, tmp_path / "whole")
    stop = StopAfter(updates, here=ranks.rank == ranks.size - 1)
    stopped, ended = train(job, ranks, tmp_path / "parts", stop=stop)
    assert (ended.done, ended.updates) == (False, updates)
    checkpoint = newest(ranks, tmp_path / "parts")
    assert checkpoint is not None
    assert checkpoint.samples == stopped.state.samples
    resumed, ended = train(job, ranks, tmp_path / "parts", checkpoint=checkpoint)
    assert (ended.done, ended.updates) == (True, ended.num_updates)
    assert digest(resumed) == digest(whole)


def test_all_ranks_hold_the_same_weights(ranks: Ranks, tmp_path: Path) -> None:
    trainer, _ = train(small_job(data={"pipeline": "torch"}), ranks, tmp_path)
    mine = digest(trainer).encode()
    assert ranks.broadcast_bytes(mine, "test.digest") == mine


def test_warm_up_and_changes_of_momentum_reach_the_updates(ranks: Ranks, tmp_path: Path) -> None:
    # (m): the warm-up counts samples, whatever the number of micro-batches
    schedule = {"warmup_epochs": 0.3, "warmup_start_lr": 0.01, "momenta": [0.9, 0.8, 0.8, 0.85]}
    for limit in (8, 16):
        job = small_job(
            schedule=schedule,
            optim={"rescale_momentum": True},
            layout={"max_micro_batch": limit, "uneven_ranks": True},
            logging={"logs_per_epoch": NUM_TRAIN},
        )
        recorder = Recorder()
        train(job, ranks, tmp_path / f"{limit}", recorder)
        starts = [record.samples - record.global_batch for record in recorder.records]
        expected = [0.01 + 0.04 * s / 90 for s in starts if s < 90]
        assert [r.lr for r in recorder.records][: len(expected)] == pytest.approx(expected)
        momenta = {r.phase: r.momentum for r in recorder.records}
        assert list(momenta.values()) == [0.9, 0.8, 0.8, 0.85]


def test_adam_stops_and_resumes_like_sgd(ranks: Ranks, tmp_path: Path) -> None:
    optim = {"name": "adamw", "lr": 2e-3, "betas": [0.9, 0.999], "weight_decay": 0.01}
    job = small_job(optim=optim, schedule={"lr_rule": "sqrt"}, data={"pipeline": "torch"})
    whole, _ = train(job, ranks, tmp_path / "whole")
    train(job, ranks, tmp_path / "parts", stop=StopAfter(11, here=ranks.rank == 0))
    resumed, _ = train(job, ranks, tmp_path / "parts", checkpoint=newest(ranks, tmp_path / "parts"))
    assert digest(resumed) == digest(whole)


def test_a_finished_run_that_is_started_again_has_its_last_results(ranks: Ranks, tmp_path: Path) -> None:
    job = small_job(update={"ema_samples": 64}, data={"pipeline": "torch"})
    _, ended = train(job, ranks, tmp_path)
    assert ended.evaluation is not None
    assert ended.evaluation.average_metrics.keys() == ended.evaluation.metrics.keys()
    _, again = train(job, ranks, tmp_path, checkpoint=newest(ranks, tmp_path))
    assert again.evaluation == ended.evaluation
