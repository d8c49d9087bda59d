"""Growth by ranks: phases of fewer ranks than there are end with the weights of growth by accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.comm.broadcast_object import broadcast_object
from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.optim.tensor_groups import parts_of_size
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.run.plan_for_ranks import plan_for_ranks
from hvd_batchgrow.train.update import gradients
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests.helpers import small_job
from tests.training import StopAfter, digest, train

pytestmark = pytest.mark.comm


def job_of(ranks: Ranks, per_phase: tuple[int, ...], **sections: Any) -> Any:
    """Four phases of 16, 48, 96 and 96 samples; each on one rank or on all."""
    counts = [1 if count == 1 else ranks.size for count in per_phase]
    layout = {"grow_by": "ranks", "ranks_per_phase": counts, "max_micro_batch": 16, **sections.pop("layout", {})}
    return small_job(layout=layout, checkpoint={"every_epochs": 0.5, "keep": 100}, **sections)


@pytest.mark.parametrize("per_phase", [(1, 2, 2, 2), (1, 1, 2, 2), (2, 1, 1, 2), (1, 1, 1, 1)])
def test_the_ranks_of_a_phase_change_no_bit(ranks: Ranks, tmp_path: Path, per_phase: tuple[int, ...]) -> None:
    exact = {"exact": True, "max_micro_batch": 8}
    grown, ended = train(job_of(ranks, per_phase, layout=exact), ranks, tmp_path / "ranks")
    plain, _ = train(small_job(layout=exact), ranks, tmp_path / "passes")
    assert ended.done
    assert ended.updates == plain.plan.num_updates
    assert digest(grown) == digest(plain)
    assert grown.state.evaluation == plain.state.evaluation


def test_ranks_that_return_start_gradients_in_the_order_of_the_others(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_to_last(tensors: list[Tensor], num_bytes: int) -> list[list[Tensor]]:
        return parts_of_size(tensors[::-1], 512)

    plain, _ = train(small_job(), ranks, tmp_path / "plain")
    # The first update sends the buckets from the first to the last; the others send them in the order of the backward.
    monkeypatch.setattr(gradients, "parts_of_size", first_to_last)
    grown, _ = train(job_of(ranks, (2, 1, 1, 2)), ranks, tmp_path / "ranks")
    for name, value in plain.parts.model.state_dict().items():
        torch.testing.assert_close(grown.parts.model.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_whole_state_of_a_run_reaches_ranks_that_join(ranks: Ranks, tmp_path: Path) -> None:
    update = {"ema_samples": 150.0, "precision": "float16"}
    job = job_of(ranks, (1, 2, 1, 2), optim={"name": "adam", "lr": 1e-3, "weight_decay": 0.0}, update=update)
    trainer, _ = train(job, ranks, tmp_path)
    assert trainer.state.average is not None
    mine = (digest(trainer), tree_digest(trainer.state.average.state_dict()), str(trainer.parts.engine.loss_scale))
    theirs = broadcast_object(ranks, mine, "test")
    assert mine == tuple(theirs)


@pytest.mark.parametrize(("asked", "updates"), [(-1, 1), (0, 7), (0, 14)])
def test_a_stop_is_heard_also_from_a_rank_that_waits_and_a_resume_ends_alike(
    ranks: Ranks, tmp_path: Path, asked: int, updates: int
) -> None:
    job = job_of(ranks, (1, 1, 2, 2))
    whole, _ = train(job, ranks, tmp_path / "whole")
    # The last rank waits through the first two phases: what it is asked there has to reach rank 0.
    stop = StopAfter(updates, here=ranks.rank == asked % ranks.size)
    stopped, ended = train(job, ranks, tmp_path / "cut", stop=stop)
    assert not ended.done
    assert stopped.state.samples < whole.state.samples
    path = sorted((tmp_path / "cut" / "checkpoints").glob("*.pt"))[-1:] if ranks.rank == 0 else []
    data = ranks.broadcast_bytes(path[0].read_bytes() if path else b"", "test")
    again, ended = train(job, ranks, tmp_path / "again", checkpoint=Checkpoint.from_bytes(data))
    assert ended.done
    assert digest(again) == digest(whole)


def test_a_failure_of_those_that_train_ends_those_that_wait(ranks: Ranks, tmp_path: Path) -> None:
    job = job_of(ranks, (1, 1, 1, 2), optim={"lr": 1e30})
    with pytest.raises(CollectiveError) as failure:
        train(job, ranks, tmp_path)
    assert (failure.value.error is None) == (ranks.rank != 0)
    assert ranks.any(flag=True)  # all can talk again


def test_more_ranks_than_launched_are_refused(ranks: Ranks) -> None:
    layout = {"grow_by": "ranks", "ranks_per_phase": [1, 1, 1, 6], "max_micro_batch": 16}
    with pytest.raises(
        JobError, match=f"a phase is planned for 6 ranks, but the run has {ranks.size} ranks?; launch 6"
    ):
        plan_for_ranks(small_job(layout=layout), ranks)


@pytest.mark.parametrize("most_words", [1 << 25, 4, 1])
def test_an_object_of_tensors_and_values_arrives_whole_in_pieces_of_any_size(
    ranks: Ranks, most_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_batchgrow.comm.broadcast_object.MOST_WORDS", most_words)
    tree = {
        "a": [torch.arange(6.0).view(2, 3), {3: torch.tensor([1, 2]), "none": None}],
        "b": (torch.tensor(2.5, dtype=torch.float64), "text", True, torch.tensor([True, False]), torch.empty(0)),
        "strided": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "last": torch.empty(0, 3),
    }
    got = broadcast_object(ranks, tree if ranks.rank == 0 else {"other": 1}, "tree")
    assert tree_digest(got) == tree_digest(tree)
    assert str(got["a"][1].keys()) == str(tree["a"][1].keys())  # type: ignore[index]
