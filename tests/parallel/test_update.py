"""Micro-batches = ranks = one batch: the golden case in every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.update.gradients import GradientBuckets
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests import golden

pytestmark = pytest.mark.comm


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("per_pass", [1, 2, 3, 6, 12])
def test_updates_are_those_of_the_formulas_whatever_the_layout(ranks: Ranks, per_pass: int, exact: bool) -> None:
    expected, losses = golden.reference()
    engine = golden.make_engine(ranks, exact=exact)
    for update in range(golden.NUM_UPDATES):
        result = golden.serve(engine, ranks, per_pass, update)
        # (q): the loss is that of all samples on all ranks, not of the last micro-batch of rank 0
        assert result.loss_sum / golden.phase().global_batch == pytest.approx(losses[update], rel=1e-12)
    golden.assert_same_weights(engine.model, expected)


def test_unequal_pieces_weigh_by_their_samples(ranks: Ranks) -> None:
    # (e): 11 groups, two a pass: ranks hold 6 and 5 of them, and the last passes one group or two
    expected, losses = golden.reference(num_ghost_batches=11)
    engine = golden.make_engine(ranks)
    for update in range(golden.NUM_UPDATES):
        result = golden.serve(engine, ranks, 2, update, num_ghost_batches=11)
        assert result.loss_sum / (11 * golden.GROUP) == pytest.approx(losses[update], rel=1e-12)
    golden.assert_same_weights(engine.model, expected)


@pytest.mark.parametrize("measures_noise", [False, True])
@pytest.mark.parametrize("per_pass", [1, 6])
def test_the_network_is_used_by_the_last_pass_alone(
    ranks: Ranks, per_pass: int, measures_noise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # (f): no all-reduce starts before the last forward is done. An update takes one per bucket, one for the totals
    # and one for which parameters were reached; measuring the noise costs one small one more.
    engine = golden.make_engine(ranks)
    if measures_noise:
        engine.measure_noise()
    num_micro_batches = math.ceil(golden.NUM_GROUPS / ranks.size / per_pass)
    forwards: list[int] = []
    sums: list[tuple[str, int]] = []
    start_all_reduce = ranks.start_all_reduce

    def record(tensor: Tensor, name: str) -> Any:
        sums.append((name, len(forwards)))
        return start_all_reduce(tensor, name)

    monkeypatch.setattr(ranks, "start_all_reduce", record)
    engine.model.register_forward_hook(lambda *_: forwards.append(1))
    golden.serve(engine, ranks, per_pass, 0)
    assert len(forwards) == num_micro_batches
    names = ["totals", "gradients.0", "reached", *(["gradient norms"] if measures_noise else [])]
    assert sums == [(name, num_micro_batches) for name in names]


def test_gradients_start_on_their_way_while_the_last_backward_runs(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = golden.make_engine(ranks)
    engine.buckets = type(engine.buckets)(engine.model.parameters(), ranks, bucket_bytes=512)
    golden.serve(engine, ranks, 12, 0)  # the first backward of all shows which gradients come in pieces
    events: list[str] = []
    start_all_reduce = ranks.start_all_reduce

    def record(tensor: Tensor, name: str) -> Any:
        events.append(name)
        return start_all_reduce(tensor, name)

    monkeypatch.setattr(ranks, "start_all_reduce", record)
    first = next(engine.model.parameters())
    first.register_post_accumulate_grad_hook(lambda _: events.append("first parameter"))
    golden.serve(engine, ranks, 12, 0)
    # The backward reaches the first parameter last; by then all buckets but its own are under way.
    before = events[: events.index("first parameter")]
    assert len(before) >= 3
    assert before[0] == "totals"


def test_a_vote_to_stop_reaches_every_rank(ranks: Ranks) -> None:
    engine = golden.make_engine(ranks)
    images, labels = golden.samples(0)
    micro_batch = MicroBatch(images[: golden.GROUP], labels[: golden.GROUP], (ranks.rank,))
    votes = [
        engine.update(iter([micro_batch]), 1, golden.phase(ranks.size), ranks.size, stop=wanted).stop_requested
        for wanted in (False, ranks.rank == ranks.size - 1, True)
    ]
    assert votes == [False, True, True]


@pytest.mark.parametrize("jump", [1.0, 1e9, 1e-9])
@pytest.mark.parametrize("num_ghost_batches", [12, 11])
def test_exact_updates_are_those_of_one_rank_to_the_bit(ranks: Ranks, num_ghost_batches: int, jump: float) -> None:
    """Against the groups of all ranks served in one process, in another order, in float32.

    After a jump of the gradient of one ghost batch, the last update is repeated in both.
    """
    marked = golden.samples(golden.NUM_UPDATES - 1)[0][: golden.GROUP].float()  # first ghost batch of the last update
    alone = golden.make_engine(SingleRank(), exact=True)
    together = golden.make_engine(ranks, exact=True)
    for engine in (alone, together):
        engine.model.float()
        engine.buckets = GradientBuckets(engine.model.parameters(), engine.ranks, exact=True)
        engine.model.register_forward_hook(
            lambda _, inputs, logits: logits * torch.where((inputs[0] == marked).all(), jump, 1.0)
        )
    for update in range(golden.NUM_UPDATES):
        golden.serve(alone, alone.ranks, 1, update, num_ghost_batches, order=-1)
        golden.serve(together, ranks, 1, update, num_ghost_batches)
    assert tree_digest(together.model.state_dict()) == tree_digest(alone.model.state_dict())
