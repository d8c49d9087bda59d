"""What the folders of examples/ have in common; tests/launch/test_examples.py runs them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.schedule.plan import compile_plan

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/job.toml"))
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@each_folder
def test_its_readme_plans_trains_and_the_run_has_its_name(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    assert "hvd-batchgrow plan job.toml" in readme
    assert "mpirun -np 2 hvd-batchgrow train job.toml" in readme
    assert load_job(folder / "job.toml").name == folder.name


@each_folder
def test_its_batch_grows_and_one_rank_and_two_can_form_it(folder: Path) -> None:
    for path in folder.glob("*.toml"):
        if path.name == "expected.toml":
            continue
        job = load_job(path)
        assert job.data.num_samples, "plan needs it where the data are missing"
        num_samples = job.data.num_samples - job.data.num_samples * job.data.validation_fraction
        plans = [compile_plan(job, ranks, int(num_samples)) for ranks in (1, 2)]
        assert plans[0].schedule == plans[1].schedule
        batches = [phase.global_batch for phase in plans[0].schedule.phases]
        assert len(set(batches)) > 1 or job.schedule.policy == "adaptive"


@each_folder
def test_it_says_what_is_expected_of_it(folder: Path) -> None:
    expected = tomllib.loads((folder / "expected.toml").read_text())
    assert set(expected) <= {"stop_after_updates", "exact_words", "at_least", "at_most", "predicts"}
    assert expected["stop_after_updates"] > 0
    assert expected.get("at_least") or expected.get("at_most")


def test_the_table_of_examples_lists_each_folder() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert [folder.name for folder in FOLDERS if f"]({folder.name}/README.md)" not in table] == []
