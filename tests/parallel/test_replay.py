"""`checks.replay_every`: wrong gradients of one rank are found and named, and nothing else changes."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import ArrayDataset
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.events import UpdateDone
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.train.replay_check import ReplayCheck
from hvd_batchgrow.train.replay_failure import refuse_suspect
from hvd_batchgrow.train.trainer import Trainer
from tests.helpers import small_job, small_source
from tests.training import Recorder, StopAfter, digest, make_trainer, newest, train

EXACT = {"exact": True, "max_micro_batch": None}
LOWEST_BIT, EXPONENT_BIT = 0, 25
"""Of a float32: the last digit, and a factor of 16."""


def job_of(**sections: Any) -> Job:
    """Of 6, then 12 ghost batches per update, on 1, 2 or 3 ranks."""
    schedule = {"global_batch": 48, "noise_factor": 2.0, **sections.pop("schedule", {})}
    return small_job(schedule=schedule, **sections)


class Updates(Recorder):
    """Keeps the updates too."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[UpdateDone] = []

    def on_update(self, event: UpdateDone) -> None:
        self.updates.append(event)

    def facts(self) -> list[Any]:
        """What a check must not change."""
        records = [(r.samples, r.loss, r.metrics, r.skipped, r.gradient_noise) for r in self.records]
        return [self.updates, records, self.evaluations]


def flip(parameter: torch.nn.Parameter, bit: int, is_faulty: Callable[[], bool]) -> None:
    """Flip a bit of the largest element of the parameter's gradient in each backward in which the device is faulty."""

    def flipped(gradient: Tensor) -> Tensor:
        if not is_faulty():
            return gradient
        words = gradient.detach().clone().contiguous().view(torch.int32)
        place = int(gradient.abs().argmax())
        words.view(-1)[place] ^= 1 << bit
        return words.view(torch.float32)

    parameter.register_hook(flipped)


def faulty_trainer(job: Job, ranks: Ranks, folder: Path, bit: int, is_faulty: Callable[[Trainer], bool]) -> Trainer:
    """Of a run whose last rank is faulty."""
    trainer = make_trainer(job, ranks, folder)
    if ranks.rank == ranks.size - 1:
        flip(next(trainer.parts.model.parameters()), bit, lambda: is_faulty(trainer))
    return trainer


def failure_of(trainer: Trainer, ranks: Ranks) -> str:
    """The message with which a run ends, on all ranks."""
    with pytest.raises(CollectiveError) as caught:
        trainer.run(StopRequest())
    return ranks.broadcast_bytes(str(caught.value).encode(), "test.message").decode()


CLEAN: dict[str, dict[str, Any]] = {
    "fast": {},
    "ghost batches one by one": {"layout": {"max_micro_batch": 8}},
    "large micro-batches": {"layout": {"max_micro_batch": 48}},
    "exact": {"layout": EXACT},
    "dali": {"data": {"pipeline": "dali"}},
    "noise": {"gradient_noise": {"measure": True}, "layout": {"max_micro_batch": 8}},
    "exact noise": {"gradient_noise": {"measure": True}, "layout": EXACT},
    "idle ranks": {"layout": {"grow_by": "ranks", "max_micro_batch": 48}},
    "average, clipping and Adam": {
        "optim": {"name": "adam", "lr": 0.01},
        "update": {"ema_samples": 100.0, "clip_norm": 0.5},
    },
    "bfloat16": {"update": {"precision": "bfloat16"}},
    "float16": {"update": {"precision": "float16"}},
    "dropout": {"model": {"name": "wrn_10_1", "channels": None, "dropout": 0.2}},
    "ShakeDrop and a Hadamard classifier": {
        "model": {"name": "wrn_10_1", "channels": None, "shakedrop": 0.5, "classifier": "hadamard"}
    },
    "buffers that follow the samples": {
        "model": {"name": "tests.parallel.test_networks:Follows", "channels": None, "ghost_batch": 8}
    },
    "unequal shares": {"schedule": {"noise_factor": 1.7}, "layout": {"uneven_ranks": True, "max_micro_batch": 16}},
}


@pytest.mark.parametrize("sections", CLEAN.values(), ids=CLEAN.keys())
def test_a_clean_run_passes_and_is_bit_identical_to_one_without_checks(
    ranks: Ranks, tmp_path: Path, sections: dict[str, Any]
) -> None:
    recorders = {every: Updates() for every in (0, 3, 1)}
    runs = {
        every: train(job_of(**sections, checks={"replay_every": every}), ranks, tmp_path / str(every), recorder)
        for every, recorder in recorders.items()
    }
    expected, ended = runs[0]
    assert ended.replay_checks is None
    for every in (1, 3):
        trainer, ended = runs[every]
        assert digest(trainer) == digest(expected)
        assert recorders[every].facts() == recorders[0].facts()
        count = trainer.state.replays.passed
        if ranks.rank == 0:  # others may be idle
            finite = ended.num_updates - trainer.state.num_skipped
            assert count == ended.num_updates // every or (trainer.state.num_skipped and count <= finite)
            assert recorders[every].records[-1].replay_checks == count
        assert ended.replay_checks is not None
        assert ended.replay_checks.startswith(f"replay checks passed: {count} ({count} bit-identical), ")


FAULTS = pytest.mark.parametrize(
    ("layout", "bit"), [({"max_micro_batch": 8}, EXPONENT_BIT), (EXACT, LOWEST_BIT)], ids=["fast", "exact"]
)


@FAULTS
def test_a_lasting_fault_ends_the_run_before_its_update_and_is_named(
    ranks: Ranks, tmp_path: Path, layout: dict[str, Any], bit: int
) -> None:
    sections: dict[str, Any] = {"schedule": {"policy": "decay"}, "checkpoint": {"every_epochs": 0.01}}
    job = job_of(layout=layout, checks={"replay_every": 4}, **sections)
    # From the eighth update on, which is the second one that is checked.
    trainer = faulty_trainer(job, ranks, tmp_path, bit, lambda trainer: trainer.state.samples >= 336)
    if ranks.size == 1:  # it repeats, so one rank cannot find it
        assert trainer.run(StopRequest()).done
        return
    message = failure_of(trainer, ranks)
    assert message.startswith("update 7, samples 336 … 383: the repetition for checks.replay_every gave another result")
    assert "the update was not applied, and no checkpoint of it was written" in message
    assert "The last check passed at sample 144: remove later checkpoints from" in message  # update 3
    saved = newest(ranks, tmp_path)
    if ranks.rank == 0:
        with pytest.raises(
            RunError, match=r"failed, and the last check passed at sample 144. The checkpoint at sample 336"
        ):
            refuse_suspect(tmp_path, 336)
        refuse_suspect(tmp_path, 144)
        refuse_suspect(tmp_path, 336)  # the record was removed with the step back
    assert saved is not None
    assert saved.samples == trainer.state.samples == 336
    assert saved.replays["passed"] == trainer.state.replays.passed == 1
    host, last = re.escape(socket.gethostname()), ranks.size - 1
    at = r"rank {} \(host " + host + r", cpu\)"
    for share, first, second in ((last, last, last - 1), (0, 0, last)):
        found = f"ghost batches of rank {share}: {at.format(first)} and {at.format(second)} differ: the gradient by"
        assert re.search(found, message), message
    assert message.count("ghost batches of rank") == 2
    if ranks.size == 2:
        assert message.count("with two ranks, it cannot be decided which is wrong") == 2
    else:
        assert message.count(f": rank {last} is wrong") == 2
    assert f"exclude {socket.gethostname()}. " in message


@FAULTS
def test_a_fault_that_does_not_repeat_is_found_on_any_number_of_ranks(
    ranks: Ranks, tmp_path: Path, layout: dict[str, Any], bit: int
) -> None:
    job = job_of(layout=layout, checks={"replay_every": 2})
    # Only in the backward passes of the update itself.
    trainer = faulty_trainer(job, ranks, tmp_path, bit, lambda trainer: trainer.parts.engine.buckets._is_backward)
    message = failure_of(trainer, ranks)
    assert message.startswith("update 1, samples 48 … 95: ")
    assert "no check of this run has passed before. Exclude" in message
    last = ranks.size - 1
    assert re.findall(r"ghost batches of rank (\d)", message) == [str(last)]
    wrong = "this device is not reliable" if ranks.size == 1 else f"rank {last} is wrong"
    assert wrong in message
    assert newest(ranks, tmp_path) is None


@pytest.mark.parametrize("layout", [{"max_micro_batch": 8}, EXACT], ids=["fast", "exact"])
def test_a_device_that_computes_other_numbers_each_time_is_found(
    ranks: Ranks, tmp_path: Path, layout: dict[str, Any]
) -> None:
    # In the fast mode, it must not raise the limit by its own repetitions.
    trainer = make_trainer(job_of(layout=layout, checks={"replay_every": 1}), ranks, tmp_path)
    generator = torch.Generator().manual_seed(3)
    if ranks.rank == ranks.size - 1:
        parameter = next(trainer.parts.model.parameters())
        parameter.register_hook(lambda gradient: gradient * (1 + 9 * torch.rand(1, generator=generator)))
    if ranks.size == 1 and not trainer.job.layout.exact:
        return  # its own limit is the only one
    assert "update 0, samples 0 … 47: " in failure_of(trainer, ranks)


@pytest.mark.parametrize("layout", [{"max_micro_batch": 8}, EXACT], ids=["fast", "exact"])
def test_repetitions_with_nan_are_found(ranks: Ranks, tmp_path: Path, layout: dict[str, Any]) -> None:
    trainer = make_trainer(job_of(layout=layout, checks={"replay_every": 1}), ranks, tmp_path)
    buckets = trainer.parts.engine.buckets
    if ranks.rank == ranks.size - 1:
        parameter = next(trainer.parts.model.parameters())
        parameter.register_hook(lambda gradient: gradient if buckets._is_backward else gradient * torch.nan)
    assert "update 0, samples 0 … 47: " in failure_of(trainer, ranks)


def test_a_sample_that_one_rank_reads_differently_is_found(ranks: Ranks, tmp_path: Path) -> None:
    source = small_source()
    if ranks.rank == 0:
        assert isinstance(source.train, ArrayDataset)
        source.train.values[:, 3, 3, 0] ^= 128
    trainer = make_trainer(job_of(checks={"replay_every": 1}), ranks, tmp_path, source=source)
    if ranks.size == 1:
        assert trainer.run(StopRequest()).done
        return
    assert failure_of(trainer, ranks).startswith("update 0, samples 0 … 47: ")


def test_differing_weights_are_reported_before_gradients(ranks: Ranks, tmp_path: Path) -> None:
    if ranks.size == 1:
        return
    trainer = make_trainer(job_of(checks={"replay_every": 3}), ranks, tmp_path)

    def change(*_: object) -> None:
        if trainer.state.samples == 48 and ranks.rank == 1:
            next(trainer.parts.model.parameters()).data.view(-1)[0] += 1e-7

    trainer.parts.model.register_forward_pre_hook(change)
    message = failure_of(trainer, ranks)
    assert message.startswith("after 96 samples the ranks hold different weights: rank 1 differs from rank 0 in")
    assert "The next update was not applied" in message


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Repeat updates in micro-batches of one ghost batch, so that the sums are rounded in another order.

    The list receives the limits that are measured then.
    """
    found: list[Tensor] = []
    of_next_update, measured_limits = ReplayCheck.of_next_update, ReplayCheck._measured_limits

    def keep(*args: Any) -> Tensor:
        found.append(measured_limits(*args))
        return found[-1]

    monkeypatch.setattr(ReplayCheck, "of_next_update", lambda self, plan, _: of_next_update(self, plan, 8))
    monkeypatch.setattr(ReplayCheck, "_measured_limits", keep)
    return found


@pytest.mark.parametrize("network", [{}, {"name": "wrn_10_1", "channels": None}, {"name": "resnet8", "channels": None}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rounding_raises_no_false_alarm(
    ranks: Ranks, tmp_path: Path, limits: list[Tensor], network: dict[str, Any], precision: str
) -> None:
    options: dict[str, Any] = {"layout": {"max_micro_batch": 48}, "model": network, "update": {"precision": precision}}
    trainer, ended = train(job_of(**options, checks={"replay_every": 1}), ranks, tmp_path / "checked")
    assert trainer.state.replays.passed == ended.num_updates
    assert limits  # bits did differ
    assert trainer.state.replays.identical < ended.num_updates
    assert digest(trainer) == digest(train(job_of(**options), ranks, tmp_path / "plain")[0])


def test_a_fault_is_found_in_spite_of_rounding(ranks: Ranks, tmp_path: Path, limits: list[Tensor]) -> None:
    job = job_of(layout={"max_micro_batch": 48}, checks={"replay_every": 1})
    trainer = faulty_trainer(
        job,
        ranks,
        tmp_path,
        EXPONENT_BIT,
        lambda trainer: trainer.state.samples >= 96 and trainer.parts.engine.buckets._is_backward,
    )
    message = failure_of(trainer, ranks)
    found = re.search(r"the gradient by (\S+) of its value \(rounding explains (\S+)\)", message)
    assert found, message
    difference, explained = map(float, found.groups())
    assert explained < difference / 5  # the limit is larger where rounding crosses the edge of a ReLU
    assert trainer.state.replays.passed > 1
    assert len(limits) > 1


def test_a_resumed_run_continues_to_count(ranks: Ranks, tmp_path: Path) -> None:
    job = job_of(checks={"replay_every": 2})
    whole, ended = train(job, ranks, tmp_path / "whole")
    stopped, _ = train(job, ranks, tmp_path / "parts", stop=StopAfter(5, here=ranks.rank == 0))
    resumed, _ = train(job, ranks, tmp_path / "parts", checkpoint=newest(ranks, tmp_path / "parts"))
    assert resumed.state.replays.passed == whole.state.replays.passed == ended.num_updates // 2
    assert replace(resumed.state.replays, seconds=0.0) == replace(whole.state.replays, seconds=0.0)
    assert resumed.state.replays.seconds > stopped.state.replays.seconds > 0
    assert digest(resumed) == digest(whole)


def test_the_wire_type_of_gradients_does_not_raise_the_limit(
    ranks: Ranks, tmp_path: Path, limits: list[Tensor]
) -> None:
    """Gradients are compared before the all-reduce. In the first update, weights do not depend on the type yet."""
    first = {}
    for wire in ("none", "float16"):
        limits.clear()
        trainer = make_trainer(
            job_of(checks={"replay_every": 1}, update={"allreduce_dtype": wire}), ranks, tmp_path / wire
        )
        buckets = trainer.parts.engine.buckets
        for parameter in trainer.parts.model.parameters():  # bits differ from the first update on
            parameter.register_hook(lambda gradient, b=buckets: gradient * (1 + 2**-20 if b._is_backward else 1))
        trainer.run(StopRequest())
        first[wire] = limits[0]
    assert torch.equal(first["none"], first["float16"])
