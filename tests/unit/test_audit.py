from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.cli import main
from hvd_batchgrow.data.order.order_digest import digest, from_halves, to_halves
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.json_lines import read_json_lines
from hvd_batchgrow.verification.audit import Audit, audit, compare_orders, read_consumed
from tests.helpers import no_report, plan_tree

N, SEED = 10, 3
BATCHES = (4, 4, 7, 8)  # an epoch ends inside the third


def write_run(
    folder: Path, batches: tuple[int, ...] = BATCHES, seed: int = SEED, swap: tuple[int, int] = (0, 0)
) -> Path:
    """Write a run folder whose record has the stream's samples, with those at the two entries `swap` exchanged."""
    bounds = np.cumsum([0, *batches])
    ids = Stream(N, SEED).ids(0, int(bounds[-1]))
    ids[list(swap)] = ids[list(swap[::-1])]
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan_tree(N, int(bounds[-1]), seed=seed)))
    lines = [
        {"samples": int(a), "global_batch": int(b - a), "digest": f"{digest(np.arange(a, b), ids[a:b]):016x}"}
        for a, b in pairwise(bounds)
    ]
    (folder / "consumed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def audited(run: Path) -> Audit:
    return audit(read_consumed(run), no_report)


def change_line(run: Path, index: int, **values: Any) -> None:
    lines = read_json_lines(run / "consumed.jsonl")
    lines[index] |= values
    (run / "consumed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@given(parts=st.lists(st.lists(st.integers(0, 2**40), min_size=0, max_size=5), max_size=6))
def test_digests_of_parts_add_up_in_float64(parts: list[list[int]]) -> None:
    whole = np.array([k for part in parts for k in part], dtype=np.int64)
    halves = [to_halves(digest(np.array(part, dtype=np.int64), np.array(part, dtype=np.int64))) for part in parts]
    low, high = (sum(column) for column in zip(*halves, strict=True)) if halves else (0.0, 0.0)
    assert from_halves(low, high) == digest(whole, whole)


def test_a_digest_changes_with_a_sample_an_entry_and_a_swap() -> None:
    stream_index, ids = np.arange(5), np.array([3, 1, 4, 0, 2])
    swapped = np.array([1, 3, 4, 0, 2])
    found = {
        digest(stream_index, ids),
        digest(stream_index, swapped),
        digest(stream_index + 5, ids),
        digest(stream_index[1:], ids[1:]),
    }
    assert len(found) == 4
    assert digest(stream_index[::-1], ids[::-1]) == digest(stream_index, ids)


def test_a_true_record_passes(tmp_path: Path) -> None:
    result = audited(write_run(tmp_path / "run"))
    assert result.passed
    counts = [(e.epoch, e.num_reached, e.once, e.missing, e.repeated) for e in result.epochs]
    assert counts == [(0, 10, 10, 0, 0), (1, 10, 10, 0, 0), (2, 3, 3, 0, 0)]


def test_a_swap_across_updates_is_found_in_both(tmp_path: Path) -> None:
    assert audited(write_run(tmp_path / "run", swap=(1, 9))).wrong_updates == (0, 2)


def test_another_seed_is_found_in_every_update(tmp_path: Path) -> None:
    assert audited(write_run(tmp_path / "run", seed=4)).wrong_updates == (0, 1, 2, 3)


def test_a_replaced_sample_counts_as_missing_and_its_replacement_as_used_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    ids = Stream(N, SEED).ids(0, 8)
    taken = ids[4:8].copy()
    taken[0] = ids[5]
    change_line(run, 1, digest=f"{digest(np.arange(4, 8), taken):016x}", replaced=[[4, int(ids[5])]])
    result = audited(run)
    assert result.wrong_updates == ()
    assert result.passed  # on record
    assert [(e.missing, e.repeated) for e in result.epochs] == [(1, 1), (0, 0), (0, 0)]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_or_doubled_update_is_refused(tmp_path: Path, lost: int) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "consumed.jsonl").read_text().splitlines()
    (run / "consumed.jsonl").write_text("\n".join(lines[:lost] + lines[lost + 1 :]))
    with pytest.raises(RunError, match="the update at sample 0 is missing or recorded twice"):
        read_consumed(run)


def test_a_folder_without_a_record_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r" does not hold a run"):
        read_consumed(tmp_path)
    run = write_run(tmp_path / "run")
    (run / "consumed.jsonl").unlink()
    with pytest.raises(RunError, match=r"consumed.jsonl has no updates"):
        read_consumed(run)


def test_runs_of_other_batches_are_compared_where_their_counters_meet(tmp_path: Path) -> None:
    first, second, other = (
        read_consumed(run)
        for run in (
            write_run(tmp_path / "a"),
            write_run(tmp_path / "b", (8, 5, 2, 20)),
            write_run(tmp_path / "c", (8, 7), swap=(9, 10)),
        )
    )
    is_same, line = compare_orders(first, second)
    assert is_same
    assert line.endswith("the same samples in the same order up to 15, compared at 2 counts")
    is_same, line = compare_orders(first, other)
    assert not is_same
    assert line.endswith("different samples between 8 and 15")


def test_runs_that_share_no_sample_counter_are_not_said_to_agree(tmp_path: Path) -> None:
    """The defect: updates of 24, and of 16 with another seed, were the same order up to sample 0."""
    first, second = (read_consumed(write_run(tmp_path / name, batches)) for name, batches in (("a", (6,)), ("b", (4,))))
    is_same, line = compare_orders(first, second)
    assert not is_same
    assert line.endswith("the orders cannot be compared: no sample counter at which both finished an update")


def test_audit_fails_if_runs_used_other_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, same = write_run(tmp_path / "a"), write_run(tmp_path / "b", (8, 5, 2, 8))
    assert main(["audit", str(first), str(same)]) == 0
    other, ids = write_run(tmp_path / "c", seed=4), Stream(N, 4).ids(0, 23)
    for k, (start, end) in enumerate(pairwise(np.cumsum([0, *BATCHES]))):
        change_line(other, k, digest=f"{digest(np.arange(start, end), ids[start:end]):016x}")
    assert main(["audit", str(other)]) == 0
    capsys.readouterr()
    assert main(["audit", str(first), str(other)]) == 1
    assert "different samples between 0 and" in capsys.readouterr().out


# --- real runs ---------------------------------------------------------------------------------------


def test_a_run_and_its_twin_used_every_sample_once_in_the_same_order(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["twin", job]) == 0
    capsys.readouterr()
    assert main(["audit", "runs/small", "runs/small-twin"]) == 0
    text = capsys.readouterr().out
    assert "runs/small: N = 300, seed 7: passed" in text
    assert "17 updates, 0 of which consumed other samples" in text
    # Both schedules stop at their first update beyond 2.2 epochs; at 160 the batch of 16 first grows.
    assert "the same samples in the same order up to" in text


def test_a_resumed_run_has_no_line_twice(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job]) == 0
    run = Path("runs/small")
    lines = (run / "consumed.jsonl").read_text()
    newest = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    newest.unlink()  # as if the run had been killed before it wrote the last one
    assert main(["train", job, "--resume", "auto"]) == 0
    assert (run / "consumed.jsonl").read_text() == lines
    assert main(["audit", str(run)]) == 0


def test_a_record_that_ends_before_the_newest_checkpoint_fails(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job]) == 0
    path = Path("runs/small/consumed.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    assert main(["audit", "runs/small"]) == 1
    message = "ends at sample 80, but the newest checkpoint is at 688: the updates in between are missing"
    assert message in capsys.readouterr().err


def test_a_tampered_record_fails(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job]) == 0
    change_line(Path("runs/small"), 5, digest="00000000deadbeef")
    assert main(["audit", "runs/small"]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "1 of which consumed other samples" in text
    assert "the first of them: update 5, samples" in text


@pytest.mark.parametrize("plan", [{"seed": "0"}, {"seed": -1}, {"seed": 1.5}, {}])
def test_a_plan_whose_job_has_no_seed_is_damaged(tmp_path: Path, plan: dict[str, Any]) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan_tree(10, 20, **plan)))
    with pytest.raises(RunError, match=r"plan.json is damaged, or not a plan: job_file.seed: "):
        read_consumed(tmp_path)
