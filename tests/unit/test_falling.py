"""A batch that falls, at a change of data, and then grows again: it is planned, and has no decaying twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.verification.digest import compare_weights, final_weights
from tests.helpers import NUM_TRAIN, job_tree

STEPS = "0:32 160:96 352:16 448:48"
# ε N / (B (1-m)) = 0.05 · 300 / (96 · 0.1) = 1.5625, and with 16 in the place of 96 9.375; 352 / 300 = 1.17333.
NO_TWIN = "no decaying twin: the noise scale rises from 1.562 to 9.375 at epoch 1.17333"


def falling_tree(root: Path | str, **sections: Any) -> dict[str, Any]:
    return {**job_tree(root, **sections), "schedule": {"policy": "steps", "epochs": 2.2, "batch_steps": STEPS}}


@pytest.fixture
def falling(job: str) -> str:
    Path("falling.toml").write_text(tomli_w.dumps(falling_tree("data")))
    return "falling.toml"


def test_the_plan_is_printed_without_a_twin_and_says_so(falling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", falling]) == 0
    text = capsys.readouterr().out
    assert "18 updates, 688 samples" in text  # 160/32 + 192/96 + 96/16 + 240/48
    assert text.count(NO_TWIN) == 1
    assert "than the twin" not in text


def test_plain_data_have_no_twin_and_say_why(falling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", falling, "--json", "--plot", "plan.svg"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [phase["global_batch"] for phase in tree["phases"]] == [32, 96, 16, 48]
    assert tree["twin"] is None
    assert tree["no_twin"].startswith(NO_TWIN)
    assert Path("plan.svg").stat().st_size


@pytest.mark.parametrize("words", [["plan", "falling.toml", "--twin"], ["twin", "falling.toml"]])
def test_what_needs_the_twin_ends_before_anything_is_trained(
    falling: str, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """The defect: `twin` trained the whole run before it found that there is nothing to compare it with."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert NO_TWIN in captured.err
    assert captured.out == ""
    assert not Path("runs/small").exists()


def test_a_measured_job_without_decisions_says_where_its_twin_comes_from(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {"policy": "adaptive", "epochs": 3.0, "global_batch": 16, "max_batch": 96}
    tree = {**job_tree("data"), "schedule": schedule, "trigger": {"name": "plateau", "patience_epochs": 1.0}}
    Path("measured.toml").write_text(tomli_w.dumps(tree))
    assert main(["plan", "measured.toml"]) == 0
    assert "'adaptive' has a twin once it has decided" in capsys.readouterr().out


def job_of(**schedule: Any) -> Job:
    return parse_job({**job_tree("data"), "schedule": {"epochs": 2.2, "global_batch": 16, **schedule}})


@pytest.mark.parametrize(
    "schedule",
    [
        # The batch makes up for a larger momentum, and the rule multiplies ε by as much.
        {
            "policy": "grow",
            "boundaries_epochs": [1.0],
            "noise_factor": 1.0,
            "momenta": [0.9, 0.95],
            "max_batch": 96,
            "lr_rule": "linear",
        },
        {"policy": "grow", "boundaries_epochs": [1.0], "noise_factor": 1.5, "exact_noise": True, "lr_rule": "sqrt"},
        {"policy": "grow", "boundaries_epochs": [1.0], "noise_factor": 1.3, "max_batch": "N/10", "lr_rule": "linear"},
    ],
)
def test_whatever_train_compiles_plan_prints(
    job: str, capsys: pytest.CaptureFixture[str], schedule: dict[str, Any]
) -> None:
    tree = {**job_tree("data"), "schedule": {"epochs": 2.2, "global_batch": 16, **schedule}}
    Path("any.toml").write_text(tomli_w.dumps(tree))
    plan = compile_plan(job_of(**schedule), 1, NUM_TRAIN)
    assert main(["plan", "any.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_updates"] == plan.num_updates


@pytest.mark.parametrize("updates", [3, 7, 10], ids=["in a phase", "where the batch falls", "in the phase after"])
def test_a_resume_changes_no_bit(falling: str, updates: int) -> None:
    assert main(["train", falling, "--name", "whole"]) == 0
    assert main(["train", falling, "--name", "cut", "--max-updates", str(updates)]) == 75
    assert main(["train", falling, "--name", "cut", "--resume", "auto"]) == 0
    whole, cut = (final_weights(Path("runs") / name) for name in ("whole", "cut"))
    assert compare_weights(whole, cut) == "bit-identical"
    assert main(["audit", "runs/whole", "runs/cut"]) == 0
