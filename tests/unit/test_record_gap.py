"""A record that ends before its checkpoint: a resume says and records it, and `audit` accepts that hole alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.storage.json_lines import read_json_lines
from hvd_batchgrow.train.events import UpdateDone
from hvd_batchgrow.train.run.record_gaps import record_gap
from hvd_batchgrow.verification.audit import audit, read_consumed
from hvd_batchgrow.verification.digest import compare_weights, final_weights

RUN = Path("runs/small")
RECORD = RUN / "consumed.jsonl"


def cut_record(lines: int) -> None:
    """Keep the first lines, as an older copy of the file has them. The first ten updates are of 16 samples."""
    RECORD.write_text("".join(RECORD.read_text().splitlines(keepends=True)[:lines]))


@pytest.fixture
def stopped(job: str) -> str:
    """A run that was stopped after 12 updates: 10 of 16, 2 of 48, so at sample 256."""
    assert main(["train", job, "--max-updates", "12"]) == 75
    return job


def test_a_resume_says_and_records_the_hole_and_audit_passes(stopped: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The defect: the resume said nothing, and `audit` failed for good."""
    cut_record(5)
    assert main(["audit", str(RUN)]) == 1
    assert "ends at sample 80, but the newest checkpoint is at 256" in capsys.readouterr().err
    assert main(["train", stopped, "--resume", "auto"]) == 0
    error = capsys.readouterr().err
    assert error.count("consumed.jsonl ends at sample 80, and the checkpoint is at sample 256") == 1
    assert main(["audit", str(RUN)]) == 0
    text = capsys.readouterr().out
    assert "passed" in text
    assert "samples 80 to 256 are not on record" in text
    result = audit(read_consumed(RUN), lambda *_: None)
    # 256 - 80 = 176 samples of the first epoch of 300 are unknown, and all others were used once.
    first, second, _ = result.epochs
    assert (first.once, first.missing, first.repeated, first.unknown) == (124, 0, 0, 176)
    assert (second.once, second.missing, second.unknown) == (300, 0, 0)


def test_a_whole_record_has_no_hole_and_says_nothing(stopped: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", stopped, "--resume", "auto"]) == 0
    error = capsys.readouterr().err
    assert "consumed.jsonl" not in error
    assert "metrics.jsonl" not in error
    assert read_consumed(RUN).gaps == []


def test_a_hole_that_no_resume_recorded_fails(stopped: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", stopped, "--resume", "auto"]) == 0
    lines = RECORD.read_text().splitlines(keepends=True)
    RECORD.write_text("".join(lines[:5] + lines[6:]))
    assert main(["audit", str(RUN)]) == 1
    error = capsys.readouterr().err
    assert "the update at sample 64 is missing or recorded twice, and no resume recorded a gap" in error


def test_wrong_samples_beside_a_hole_fail(stopped: str, capsys: pytest.CaptureFixture[str]) -> None:
    cut_record(5)
    assert main(["train", stopped, "--resume", "auto"]) == 0
    lines = read_json_lines(RECORD)
    lines[2]["digest"] = "00000000deadbeef"
    RECORD.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    assert main(["audit", str(RUN)]) == 1
    assert "1 of which consumed other samples" in capsys.readouterr().out


def test_a_later_resume_that_trains_part_of_the_hole_again_makes_it_smaller(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints at 160, where the first phase ends, and at 256 are there; the record ends at 80."""
    assert main(["train", job, "--max-updates", "12"]) == 75
    cut_record(5)
    assert main(["train", job, "--resume", "auto", "--max-updates", "1"]) == 75
    assert read_consumed(RUN).gaps == [(80, 256)]
    for path in (RUN / "checkpoints").iterdir():
        if path.stem > "samples-000000000000160":
            path.unlink()
    assert main(["train", job, "--resume", "auto"]) == 0
    assert read_consumed(RUN).gaps == [(80, 160)]
    assert main(["audit", str(RUN)]) == 0


def test_curves_with_a_gap_are_reported_too(stopped: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Records are due every 60 samples, so at 64, 128, … in updates of 16, and at a stop, here at 256."""
    path = RUN / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["samples"] <= 80]
    path.write_text("".join(lines))
    capsys.readouterr()
    assert main(["train", stopped, "--resume", "auto"]) == 0
    error = capsys.readouterr().err
    assert "metrics.jsonl ends at sample 64, and the checkpoint is at sample 256" in error
    assert "consumed.jsonl" not in error
    assert main(["audit", str(RUN)]) == 0


def test_without_any_record_all_samples_up_to_the_checkpoint_are_missing(stopped: str) -> None:
    RECORD.unlink()
    assert main(["train", stopped, "--resume", "auto"]) == 0
    assert read_consumed(RUN).gaps == [(0, 256)]


def test_a_hole_changes_no_weight_and_orders_are_compared_around_it(
    stopped: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(RUN, "runs/copy")
    cut_record(5)
    for name in ("small", "copy"):
        assert main(["train", stopped, "--name", name, "--resume", "auto"]) == 0
    assert compare_weights(*(final_weights(Path("runs") / name) for name in ("small", "copy"))) == "bit-identical"
    capsys.readouterr()
    assert main(["audit", "runs/copy", "runs/small"]) == 0
    assert "the same samples in the same order up to 688" in (text := capsys.readouterr().out)
    assert "except for 176 samples that were not recorded" in text


def test_an_update_that_the_next_attempt_records_itself_is_not_a_hole(tmp_path: Path) -> None:
    """An elastic job that lost its rank 0 hands the last update on."""
    path, last = tmp_path / "consumed.jsonl", UpdateDone(32, 16, 0, ())
    path.write_text("".join(json.dumps({"samples": k, "global_batch": 16, "digest": "0"}) + "\n" for k in (0, 16)))
    assert record_gap(path, 32) is None
    assert record_gap(path, 48, last) is None
    assert record_gap(path, 48) == (32, 48)
    assert record_gap(path, 64, UpdateDone(48, 16, 0, ())) == (32, 48)


@pytest.mark.parametrize("hole", [{"missing_to": 80}, {"missing_to": "x"}, {"missing_to": 96, "digest": "0"}])
def test_a_line_that_is_not_a_hole_is_damaged(
    stopped: str, capsys: pytest.CaptureFixture[str], hole: dict[str, object]
) -> None:
    cut_record(5)
    with RECORD.open("a") as file:
        file.write(json.dumps({"samples": 80, **hole}) + "\n")
    assert main(["audit", str(RUN)]) == 1
    assert "consumed.jsonl is damaged: line 6 is not an update" in capsys.readouterr().err
