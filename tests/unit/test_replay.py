"""The parts of `checks.replay_every` that need one process: sketches, results, verdicts and messages."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import CollectiveError, SingleRank
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.replay_check import ReplayCheck, _Update
from hvd_batchgrow.train.replay_failure import refuse_suspect, write_failure
from hvd_batchgrow.train.replay_verdict import Finding, Occasion, RankLocation, describe
from hvd_batchgrow.train.train_state import ReplayTally
from hvd_batchgrow.train.update.local_sums import WIDTH, LocalSums, sketch
from tests.helpers import small_job, small_source

THREE = [RankLocation(rank, f"node{rank}", f"cuda:{rank}") for rank in range(3)]
OCCASION = Occasion(update=7, samples=1000, global_batch=512, last_passed=400, folder="runs/big")


def values(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [3, WIDTH, 5 * WIDTH + 7, 200 * WIDTH])
def test_a_change_of_one_value_changes_a_sketch_by_as_much(count: int) -> None:
    floats = values(count)
    for first in (floats, (floats.double() * 2**50).long()):
        for place in {0, count // 2, count - 1}:
            second = first.clone()
            second[place] += 5
            apart = sketch(second) - sketch(first)
            assert apart.abs().max() == pytest.approx(5, rel=1e-5)
            assert (apart.abs() > 1e-9).sum() == 1


def test_the_norm_of_a_sketch_estimates_the_norm_of_the_values() -> None:
    many = values(100 * WIDTH)
    assert float(sketch(many).norm()) == pytest.approx(float(many.norm()), rel=0.1)
    assert float(sketch(many).norm()) != pytest.approx(float(many.norm()), rel=1e-6)


def test_integers_are_summed_modulo_2_to_the_64() -> None:
    large = torch.full((3 * WIDTH,), 2**62 + 1)
    change = torch.zeros_like(large)
    change[WIDTH] = 1
    assert (sketch(large + change) - sketch(large)).abs().sum() == 1


def result(gradient: Tensor, loss: float = 2.0, digest: int = 2**64 - 5) -> LocalSums:
    return LocalSums(torch.stack([sketch(gradient), sketch(gradient * 3)]), loss, digest)


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_a_result_travels_as_words(kind: torch.dtype) -> None:
    mine = result((values(50) * 1000).to(kind), loss=-0.1)
    copy = mine.from_words(mine.words())
    assert torch.equal(copy.sketches, mine.sketches)
    assert (copy.loss, copy.digest) == (-0.1, 2**64 - 5)
    assert mine.agrees(copy, None)


def test_results_agree_by_bits_or_within_limits() -> None:
    gradient = values(50)
    mine, limits = result(gradient), torch.tensor([1e-3, 1e-3, 1e-6], dtype=torch.float64)
    near, far = result(gradient * (1 + 1e-4)), result(gradient * (1 + 1e-2))
    assert [mine.agrees(other, None) for other in (near, far)] == [False, False]
    assert [mine.agrees(other, limits) for other in (near, far)] == [True, False]
    assert mine.distances(far).tolist() == pytest.approx([1e-2, 1e-2, 0.0], rel=1e-3)
    for other in (result(gradient, loss=2.00001), result(gradient, digest=7), result(gradient * torch.nan)):
        assert not mine.agrees(other, limits)
        assert not mine.agrees(other, None)
    zero = result(gradient * 0, loss=0.0)
    assert zero.agrees(result(gradient * 0, loss=0.0), limits)
    assert not zero.agrees(mine, limits)


def finding(ranks: tuple[int, int, int], agrees: tuple[bool, bool], **changes: Any) -> Finding:
    numbers = {"gradient": 0.5, "gradient_limit": 1e-5, "loss": 0.0, "loss_limit": 1e-6, "same_samples": True}
    return Finding(ranks[0], ranks, agrees, **numbers | changes)


@pytest.mark.parametrize(
    ("faulty", "expected"), [({}, None), ({0}, 0), ({1}, 1), ({2}, None), ({0, 1}, None), ({0, 2}, None)]
)
def test_the_majority_of_three_ranks_decides(faulty: set[int], expected: int | None) -> None:
    # Each faulty rank computes another number; the first two results disagree only if one of them is faulty.
    results = [100 + rank if rank in faulty else 7 for rank in range(3)]
    found = finding((0, 1, 2), (results[2] == results[0], results[2] == results[1]))
    assert found.wrong == (expected if results[0] != results[1] else None)


def test_two_ranks_decide_only_if_one_contradicts_itself() -> None:
    # Rank 1 computes the share first, then rank 0, then rank 1 again.
    assert finding((1, 0, 1), (True, False)).wrong is None
    assert finding((1, 0, 1), (False, True)).wrong == 1
    assert finding((1, 0, 1), (False, False)).wrong is None


def test_one_rank_that_contradicts_itself_is_wrong() -> None:
    assert [finding((0, 0, 0), agrees).wrong for agrees in ((True, False), (False, True))] == [0, 0]


def test_the_message_names_ranks_sizes_and_what_to_do() -> None:
    findings = [finding((1, 0, 2), (False, True)), finding((2, 1, 0), (True, False), same_samples=False)]
    assert describe(findings, THREE, OCCASION).split("\n  ") == [
        "update 7, samples 1,000 … 1,511: the repetition for checks.replay_every gave another result. "
        "A device, its memory or its host computes wrong numbers, or reads other data:",
        "ghost batches of rank 1: rank 1 (host node1, cuda:1) and rank 0 (host node0, cuda:0) differ: the gradient by "
        "0.5 of its value (rounding explains 1e-05), the loss by 0 of its value (rounding explains 1e-06)",
        "the result of rank 2 (host node2, cuda:2) agrees with that of rank 0: rank 1 is wrong",
        "ghost batches of rank 2: rank 2 (host node2, cuda:2) and rank 1 (host node1, cuda:1) differ: the gradient by "
        "0.5 of its value (rounding explains 1e-05), the loss by 0 of its value (rounding explains 1e-06); "
        "they have not read the same samples",
        "the result of rank 0 (host node0, cuda:0) agrees with that of rank 2: rank 1 is wrong",
        "the update was not applied, and no checkpoint of it was written",
        "exclude node1. The last check passed at sample 400: remove later checkpoints from runs/big/checkpoints, and "
        "continue with --resume auto",
    ]


@pytest.mark.parametrize(("size", "agrees"), list(product([1, 2, 3], product([False, True], repeat=2))))
def test_every_outcome_has_a_message(size: int, agrees: tuple[bool, bool]) -> None:
    share = size - 1
    ranks = (share, (share - 1) % size, (share - 2) % size)
    found = finding(ranks, agrees, gradient_limit=0.0)
    text = describe([found], THREE[:size], Occasion(0, 0, 8, None, "runs/x"))
    assert "0.5 of its value (must be 0)" in text
    assert "no check of this run has passed before. Exclude node" in text
    if size > 1:
        expected = "it cannot be decided which is wrong" if found.wrong is None else f"rank {found.wrong} is wrong"
        assert expected in text
        assert ("with two ranks, " in text) == (size == 2 and found.wrong is None)
    else:
        assert "two computations of rank 0" in text


class Draws(torch.nn.Module):
    """A network that draws random numbers in its own way."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classify = torch.nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classify(torch.nn.functional.dropout(images.flatten(1), 0.5, self.training))
        return logits


class Counts(Draws):
    """A network that counts its forward passes outside its buffers."""

    count = 0

    def forward(self, images: Tensor) -> Tensor:
        self.count += 1
        logits: Tensor = self.classify(images.flatten(1))
        return logits


@pytest.mark.parametrize(("network", "reason"), [("Draws", "random"), ("Counts", "count")])
def test_a_network_whose_passes_cannot_be_repeated_is_refused(network: str, reason: str) -> None:
    model = {"name": f"tests.unit.test_replay:{network}", "channels": None}
    device = torch.device("cpu")
    TrainingParts(small_job(model=model), small_source(), SingleRank(), device)
    with pytest.raises(CollectiveError) as caught:
        TrainingParts(small_job(model=model, checks={"replay_every": 5}), small_source(), SingleRank(), device)
    assert isinstance(caught.value.error, JobError)
    assert f"checks.replay_every: is not possible with {model['name']}, whose repeated passes may" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("last", [None, 96])
def test_a_run_continues_after_a_failed_check_only_from_before_the_last_passed_one(
    tmp_path: Path, last: int | None
) -> None:
    write_failure(tmp_path, "rank 1 on host b is wrong", 240, last)
    since = "no check has passed before" if last is None else "the last check passed at sample 96"
    with pytest.raises(
        RunError, match=rf"the replay check at sample 240 failed, and {since}. The checkpoint at sample 128"
    ):
        refuse_suspect(tmp_path, 128)
    assert "host b" in (tmp_path / "failed_check.json").read_text()
    refuse_suspect(tmp_path, None if last is None else 96)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{}", "[" * 100_000])
def test_a_damaged_record_of_a_failed_check_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "failed_check.json").write_text(text)
    with pytest.raises(RunError, match=r"failed_check\.json is damaged"):
        refuse_suspect(tmp_path, 128)


@pytest.mark.slow
def test_train_refuses_to_resume_after_a_failed_check(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--max-updates", "2"]) == 75
    write_failure(Path("runs/small"), "rank 1 is wrong", 16, None)
    assert main(["train", job, "--resume", "auto"]) == 1
    assert "remove all checkpoints from runs/small/checkpoints" in capsys.readouterr().err
    assert main(["train", job, "--fork", "again"]) == 1
    assert not Path("runs/again").exists()
    assert main(["train", job, "--overwrite"]) == 0


def test_a_failed_check_is_reported_even_if_it_cannot_be_recorded(tmp_path: Path) -> None:
    parts: Any = SimpleNamespace(device=torch.device("cpu"))
    state: Any = SimpleNamespace(replays=ReplayTally())
    check = ReplayCheck(parts, SingleRank(), state, tmp_path / "gone")
    with pytest.raises(CollectiveError) as raised:
        check._fail(_Update(16, 16, 16, 1), [finding((0, 0, 0), (True, False))])
    assert "update 1, samples 16 … 31: the repetition for checks.replay_every gave another result" in str(raised.value)
    path = tmp_path / "gone/failed_check.json"
    assert f"{path} cannot be written: No such file or directory: a resume will not refuse" in str(raised.value)
