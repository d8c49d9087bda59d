"""Megatron-LM's syntax of batch-size steps, with its suffixes, in samples or tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.cli import main
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.batch_steps import check_batch_steps, parse_batch_steps
from hvd_batchgrow.schedule.plan import compile_plan
from tests.helpers import job_tree


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("0:768", [(0, 768)]),
        ("0:768 250000:1536", [(0, 768), (250_000, 1536)]),
        ("0:768 250K:1536", [(0, 768), (250_000, 1536)]),
        ("0K:768  3M:1536\t2B:3072 ", [(0, 768), (3_000_000, 1536), (2_000_000_000, 3072)]),
        ("0:8 0.5K:16 1.25M:32", [(0, 8), (500, 16), (1_250_000, 32)]),
        ("0:8 1.000000000001T:16", [(0, 8), (1_000_000_000_001, 16)]),
    ],
)
def test_suffixes_are_thousands_millions_and_billions_of_samples(text: str, pairs: list[tuple[int, int]]) -> None:
    assert parse_batch_steps(check_batch_steps(text)) == pairs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0:768 250k:1536",
            r"'250k' is not a whole count of samples or tokens below 10¹⁸; did you mean 250K\? "
            r"suffixes: K, M, B, T; example: '0:768 250K:1536'$",
        ),
        ("0:768 250KB:1536", r"'250KB' is not a whole count of samples or tokens below 10¹⁸; suffixes: K, M, B, T;"),
        ("0:768 1.2345K:1536", r"'1.2345K' is not a whole count"),
        ("0:768 2.5:1536", r"'2.5' is not a whole count of samples"),
        ("0:768 -5:1536", r"'-5' is not a whole count of samples"),
        ("0:768 9000000000B:1536", r"'9000000000B' is not a whole count of samples or tokens below 10¹⁸;"),
        ("0:1K 250K:2K", r"'1K' is not a batch: write whole samples without a suffix"),
        ("0:768 250K", r"'250K' is not a pair SAMPLES:BATCH"),
        ("5K:768 250K:1536", r"the first from sample 0"),
        ("", r"must be pairs SAMPLES:BATCH, the first from sample 0"),
    ],
)
def test_what_is_wrong_is_named_with_an_example(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch_steps(text)


def test_a_plan_counts_samples_and_no_tokens() -> None:
    """0.16K samples are 10 updates of 16; 0.352K are 6 more of 32."""
    tree = {**job_tree(), "schedule": {"policy": "steps", "epochs": 2.0, "batch_steps": "0:16 0.16K:32 0.352K:48"}}
    phases = compile_plan(parse_job(tree), 1, 300).schedule.phases
    assert [(phase.start_samples, phase.num_updates) for phase in phases[:2]] == [(0, 10), (160, 6)]


@pytest.mark.parametrize(
    ("unit", "starts"),
    [
        # phases begin at the first update that reaches 160 and 352 samples: 10 updates of 16, then 6 of 32
        ({"batch_steps": "0:16 160:32 352:48"}, [0, 160, 352]),
        ({"batch_steps": "0:16 160:32 352:48", "batch_steps_unit": "samples"}, [0, 160, 352]),
        # 1280 tokens of 8 each are 160 samples; 2816 are 352
        ({"batch_steps": "0:16 1.28K:32 2816:48", "batch_steps_unit": "tokens", "sequence_length": 8}, [0, 160, 352]),
        # 1287 / 8 = 160.875 samples, which Megatron-LM cuts to 160; 2823 / 8 = 352.875
        ({"batch_steps": "0:16 1287:32 2823:48", "batch_steps_unit": "tokens", "sequence_length": 8}, [0, 160, 352]),
    ],
)
def test_the_unit_of_the_counts_is_stated(unit: dict[str, Any], starts: list[int]) -> None:
    tree = {**job_tree(), "schedule": {"policy": "steps", "epochs": 2.0, **unit}}
    phases = compile_plan(parse_job(tree), 1, 300).schedule.phases
    assert [phase.start_samples for phase in phases] == starts
    assert [phase.global_batch for phase in phases] == [16, 32, 48]


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (
            {"batch_steps_unit": "tokens"},
            r"schedule.sequence_length: batch_steps_unit = 'tokens' needs it: tokens of one",
        ),
        (
            {"sequence_length": 8},
            r"schedule.sequence_length: is for batch_steps_unit = 'tokens', not 'samples'; remove it",
        ),
        (
            {"batch_steps_unit": "tokens", "sequence_length": 500},
            r"at samples \[0, 0\] \(tokens / sequence_length = 500",
        ),
        ({"batch_steps_unit": "steps"}, r"schedule.batch_steps_unit: .*'samples' or 'tokens'"),
    ],
)
def test_a_unit_that_is_not_complete_is_refused(unit: dict[str, Any], message: str) -> None:
    tree = {**job_tree(), "schedule": {"policy": "steps", "epochs": 2.0, "batch_steps": "0:16 160:32", **unit}}
    with pytest.raises(JobError, match=message):
        compile_plan(parse_job(tree), 1, 300)


def test_a_bad_suffix_is_a_fault_of_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {**job_tree(), "schedule": {"policy": "steps", "epochs": 2.0, "batch_steps": "0:16 0.2k:32"}}
    (tmp_path / "job.toml").write_text(tomli_w.dumps(tree))
    assert main(["plan", str(tmp_path / "job.toml")]) == 2
    error = capsys.readouterr().err
    assert "schedule.batch_steps: '0.2k' is not a whole count of samples" in error
    assert "example: '0:768 250K:1536', got '0:16 0.2k:32'" in error
