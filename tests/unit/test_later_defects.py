"""Defects that were found in other trainers in 2026: (s) to (w) of docs/defects.md."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from torch import Tensor, nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.data.order.order_digest import digest
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.verification.digest import compare_weights, final_weights
from tests.helpers import NUM_TRAIN, job_tree, small_job, small_source
from tests.training import make_trainer


def linear(num_classes: int) -> nn.Module:
    """A network whose samples do not meet."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def test_every_counter_finds_its_own_phase() -> None:
    """(s): a lookup over rising starts that returns the first phase wherever it looks."""
    steps = {0: 16, 160: 32, 352: 8, 400: 48}
    text = " ".join(f"{at}:{batch}" for at, batch in steps.items())
    tree = {**job_tree(), "schedule": {"policy": "steps", "epochs": 2.0, "batch_steps": text}}
    plan = compile_plan(parse_job(tree), 1, NUM_TRAIN)
    counters = {0: 16, 16: 16, 144: 16, 160: 32, 320: 32, 352: 8, 392: 8, 400: 48, 592: 48}
    assert {samples: plan.schedule.at(samples).global_batch for samples in counters} == counters
    assert [plan.schedule.index_at(samples) for samples in steps] == [0, 1, 2, 3]


@pytest.mark.parametrize("micro_batch", [8, 24, 48])
def test_updates_over_the_end_of_an_epoch_and_of_the_run_are_plain_torchs(tmp_path: Path, micro_batch: int) -> None:
    """(t): the last window divided by the configured passes; (u): micro-batches left over for the next epoch's update.

    300 samples an epoch in batches of 48: the seventh update takes 12 of the first epoch and 36 of the second, and the
    run ends within its last batch. Plain torch takes the same samples, whole batch by whole batch, without passes.
    """
    job = small_job(
        data={"crop_padding": 0, "hflip": False, "pipeline": "torch"},
        model={"name": f"{__name__}:linear", "channels": None},
        optim={"weight_decay": 0.0},
        schedule={"policy": "decay", "global_batch": 48, "noise_factor": 2.0},
        layout={"max_micro_batch": micro_batch},
    )
    source = small_source()
    trainer = make_trainer(job, SingleRank(), tmp_path, source=source)
    plain = copy.deepcopy(trainer.parts.model)
    trainer.run(StopRequest())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.0, momentum=0.9)
    stream, schedule, samples = Stream(NUM_TRAIN, job.seed), trainer.plan.schedule, 0
    while samples < schedule.end_samples:
        ids = stream.ids(samples, samples + 48)
        pixels = torch.from_numpy(source.train.fetch(ids)).movedim(-1, 1).float()
        optimizer.param_groups[0]["lr"] = schedule.at(samples).lr
        optimizer.zero_grad()
        logits = plain((pixels / 255 - 0.5) / 0.25)
        nn.functional.cross_entropy(logits, torch.from_numpy(source.train.targets[ids])).backward()
        optimizer.step()
        samples += 48
    assert samples == trainer.state.samples == 672  # 14 updates: 2.2 epochs are 660 samples
    tensors: list[tuple[Tensor, Tensor]] = list(zip(trainer.parts.model.parameters(), plain.parameters(), strict=True))
    for ours, theirs in tensors:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_a_resume_at_the_end_of_an_epoch_continues_with_the_next(
    job: str, epochs_before: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """(v): a resume exactly there that skips the next epoch; (w): one that takes the first epoch's order again.

    Batches of 20, in ghost batches of 10: 15 updates an epoch of 300, so that a batch ends where the epoch does.
    """
    tree = job_tree("data", model={"ghost_batch": 10}, layout={"max_micro_batch": 20})
    tree["schedule"] = {"policy": "decay", "epochs": 3.0, "global_batch": 20}
    Path("even.toml").write_text(tomli_w.dumps(tree))
    assert main(["train", "even.toml", "--name", "whole"]) == 0
    assert main(["train", "even.toml", "--name", "cut", "--max-updates", str(15 * epochs_before)]) == 75
    assert final_weights(Path("runs/cut")).samples == 300 * epochs_before
    assert main(["train", "even.toml", "--name", "cut", "--resume", "auto"]) == 0
    capsys.readouterr()
    lines = [json.loads(line) for line in Path("runs/cut/consumed.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == list(range(0, 900, 20))
    # The first update after the resume took the next epoch's samples, at their places in the stream.
    stream, start = Stream(NUM_TRAIN, tree["seed"]), 300 * epochs_before
    orders = [stream.ids(300 * epoch, 300 * (epoch + 1)) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(300)) for order in orders)
    assert (orders[epochs_before] != orders[0]).any()
    taken = digest(np.arange(start, start + 20), orders[epochs_before][:20])
    assert lines[start // 20]["digest"] == f"{taken:016x}"
    assert compare_weights(*(final_weights(Path("runs") / name) for name in ("whole", "cut"))) == "bit-identical"
    assert main(["audit", "runs/whole", "runs/cut"]) == 0
