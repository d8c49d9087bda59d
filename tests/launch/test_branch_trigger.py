"""The trigger `branch` in exact mode: one rank and two make the same decision and end with the same weights."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from hvd_batchgrow.verification.digest import compare_weights, final_weights
from tests.helpers import measured_tree, small_source, write_idx_folder
from tests.launch.test_forms import FORMS, captured


def test_one_rank_and_two_decide_the_same_in_exact_mode(tmp_path: Path) -> None:
    write_idx_folder(tmp_path / "data", small_source())
    trigger = {"name": "branch", "factors": [1, 2], "branch_samples": 512, "tolerance": 1000.0}
    sections = {"schedule": {"epochs": 36.0, "lr_rule": "linear"}, "layout": {"exact": True}}
    (tmp_path / "job.toml").write_text(tomli_w.dumps(measured_tree("data", trigger, **sections)))
    runs = []
    for form in ("one", "mpirun"):
        command = ["hvd-batchgrow", "train", "job.toml", "--name", form, "--max-updates", "26"]
        done = captured([*FORMS[form], *command], tmp_path, 300)
        assert done.returncode == 75, done.stderr
        runs.append(tmp_path / "runs" / form)
    made = [(run / "decisions.jsonl").read_text() for run in runs]
    assert made[0] == made[1]
    assert made[0].count("\n") == 1
    assert compare_weights(final_weights(runs[0]), final_weights(runs[1])) == "bit-identical"
