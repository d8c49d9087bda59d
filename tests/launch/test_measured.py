"""The cover-type job, whose batch grows on plateaus, over a generated table of the same columns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.launch.test_forms import FORMS, captured

JOB = Path(__file__).parents[2] / "jobs" / "covtype_dense7_plateau.toml"
NUM_ROWS = 12_000


def write_table(path: Path) -> None:
    """Rows of 54 integers like the forest cover data, with random types 1 … 7: the loss soon reaches a plateau."""
    generator = np.random.default_rng(0)
    table = np.concatenate([generator.integers(0, 4000, (NUM_ROWS, 10)), generator.integers(0, 2, (NUM_ROWS, 44))], 1)
    types = generator.integers(1, 8, NUM_ROWS)
    np.savetxt(path, np.column_stack([table, types]), fmt="%d", delimiter=",")


def test_the_batch_grows_on_plateaus_up_to_a_tenth_then_the_learning_rate_falls(tmp_path: Path) -> None:
    write_table(tmp_path / "covtype.data")
    smaller = [
        "--data.num-samples",
        "9600",
        "--schedule.epochs",
        "8",
        "--trigger.patience-epochs",
        "0",
        "--model.channels",
        "[32,32,32,32,32,32]",
    ]
    command = ["hvd-batchgrow", "train", str(JOB), "--data.root", str(tmp_path), *smaller]
    done = captured([*FORMS["mpirun"], *command], tmp_path, 600)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "covtype_dense7_plateau"
    decisions = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
    # N = 9600, and a tenth of it holds three times 256.
    assert [decision["new_batch"] for decision in decisions] == [768] * len(decisions)
    rates = [decision["new_lr"] for decision in decisions]
    # The first decision wants 1280: what the batch cannot take, and each later factor of 5, is the learning rate's.
    assert rates == pytest.approx([6e-4 * 768 / 1280 / 5**k for k in range(len(rates))], rel=1e-12)
    assert len(decisions) >= 2
    plan = json.loads((run / "plan.json").read_text())
    assert [phase["global_batch"] for phase in plan["phases"]] == [256, *(d["new_batch"] for d in decisions)]
