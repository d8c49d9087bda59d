"""The tables of r-cran-mlbench: from the columns of R to rows and labels, and the jobs that use the made sets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.paper.make_tables import TABLES, Table, check_counts, counts_by_class, features_of, rows_and_labels
from hvd_batchgrow.data.source_checks import check_data, known_num_samples
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.plan import compile_plan

JOBS = Path(__file__).parents[2] / "benchmarks/paper/jobs"
SMALL = Table("small", "Small", "class", 3, {"b": 1, "a": 2}, {"b": 2, "a": 2})
COLUMNS: dict[str, list[Any]] = {"x": [1.0, -2.0, 3.0, 4.0], "class": ["a", "b", "a", "b"], "y": [0.0, 5.0, 0.0, 6.0]}


def test_rows_keep_the_order_of_columns_and_labels_that_of_the_classes() -> None:
    rows, labels = rows_and_labels(COLUMNS, SMALL)
    assert (str(rows.dtype), str(labels.dtype)) == ("int32", "uint8")
    assert rows.tolist() == [[1, 0], [-2, 5], [3, 0], [4, 6]]
    assert labels.tolist() == [1, 0, 1, 0]
    assert counts_by_class(labels, SMALL) == {"b": 2, "a": 2}
    check_counts(labels, SMALL)


def test_the_features_of_a_table_with_outliers_are_signed_logarithms() -> None:
    rows = np.array([[-1, 0], [3, 9999]], np.int32)
    assert features_of(rows, SMALL) is rows
    found = features_of(rows, replace(SMALL, has_outliers=True))
    assert found.dtype == np.float32
    expected = [-math.log(2), 0.0, math.log(4), math.log(10_000)]
    assert found.ravel().tolist() == pytest.approx(expected, rel=1e-6)
    assert replace(SMALL, has_outliers=True).made_of != SMALL.made_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": ["a", "c", "a", "b"]}, "'c' is not a class; the classes are b, a"),
        ({"y": [0.0, 5.5, 0.0, 6.0]}, "column 'y' has 5.5 in row 2, which is not an integer"),
        ({"x": [0.0, 5.0, float("nan"), 6.0]}, "column 'x' has nan in row 3, which is not an integer"),
    ],
)
def test_a_table_that_is_not_as_described_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        rows_and_labels({**COLUMNS, **changes}, SMALL)


def test_a_table_without_classes_or_with_other_counts_is_refused() -> None:
    with pytest.raises(RunError, match="Small has no column 'class'; it has x, y"):
        rows_and_labels({"x": COLUMNS["x"], "y": COLUMNS["y"]}, SMALL)
    with pytest.raises(RunError, match="all rows contain 3 of class b, and its description says 2"):
        check_counts(np.array([0, 0, 1, 0], np.uint8), SMALL)
    with pytest.raises(RunError, match="the first 3 rows contain 2 of class b, and its description says 1"):
        check_counts(np.array([0, 0, 1, 1], np.uint8), SMALL)


def test_the_published_counts_add_up() -> None:
    letter, shuttle = TABLES
    assert (sum(letter.counts.values()), len(letter.counts), letter.num_train) == (20_000, 26, 16_000)
    assert (sum(shuttle.counts.values()), len(shuttle.counts), shuttle.num_train) == (58_000, 7, 43_500)
    assert sum(shuttle.train_counts.values()) == shuttle.num_train
    assert list(shuttle.train_counts) == list(shuttle.counts)


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.stem)
def test_each_job_of_a_made_set_can_be_planned(path: Path) -> None:
    job = load_job(path)
    assert job.name == path.stem
    assert check_data(job.data) == []
    plan = compile_plan(job, 1, known_num_samples(job.data))
    batches = [phase.global_batch for phase in plan.schedule.phases]
    assert batches == sorted(batches)
    if path.stem.endswith("_grow"):
        assert batches[1] == 5 * batches[0]
    sizes = {f"build/data/{table.name}": table.num_train for table in TABLES}
    assert job.data.num_samples == sizes.get(str(job.data.root), job.data.num_samples)
