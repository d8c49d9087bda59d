"""`python -m benchmarks.paper`: studies, what is kept of their runs, tables, and training that can be interrupted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from benchmarks.paper import training
from benchmarks.paper.figures import study_figures
from benchmarks.paper.kept_files import pack, unpack
from benchmarks.paper.pages import replace_block, write_table
from benchmarks.paper.studies import STUDIES, TABLES, large_batch
from benchmarks.paper.studies.study import Arm, Study, Table, keys
from benchmarks.paper.tables import check_jobs, interval_text, markdown, read_runs, result_of
from benchmarks.paper.training import STOPPED, Task, Trainer, tasks_of
from hvd_batchgrow.config.types import Section
from hvd_batchgrow.job_file import load_job, split_overrides
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.statistics import paired_difference
from tests.helpers import job_tree, plan_tree, small_source, write_idx_folder

ROOT = Path(__file__).parents[2]
STUDY = Study(
    "study", (Arm("a", "jobs/job.toml", has_twin=True), Arm("b", "jobs/job.toml", keys(optim__lr="0.2"))), (0, 1)
)


def write_run(folder: Path, name: str, updates: int, accuracy: float) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(plan_tree(300, 600, seed=0)))
    lines: list[dict[str, Any]] = [
        {"kind": "train", "samples": 600, "epoch": 2.0, "updates": updates, "phase": 0, "loss": 1.0},
        {
            "kind": "eval",
            "dataset": "test",
            "samples": 600,
            "epoch": 2.0,
            "updates": updates,
            "loss": 0.5,
            "top1": accuracy,
        },
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_each_arm_is_a_job_that_can_be_planned(study: Study) -> None:
    assert len({arm.name for arm in study.arms}) == len(study.arms)
    for task in tasks_of([study], [0]):
        words = task.command(Path("work"))
        _, overrides = split_overrides(words[words.index(f"work/{study.name}") + 1 :])
        job = load_job(ROOT / words[4], overrides)
        assert isinstance(job, Section)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_records_that_are_kept_are_of_the_jobs_of_today(study: Study) -> None:
    check_jobs(study, read_runs(study, ROOT / "docs/results"))


def test_the_learning_rates_for_the_large_batch_are_the_best_of_the_trials() -> None:
    table, runs = large_batch.TABLES[0], read_runs(large_batch.TUNING, ROOT / "docs/results")
    assert len(runs) == len(large_batch.TUNING.arms)
    for optimizer, chosen in (("nesterov", large_batch.NESTEROV), ("lars", large_batch.LARS)):
        trials = [arm for arm in large_batch.TUNING.arms if arm.name.startswith(optimizer)]
        best = max(trials, key=lambda arm: result_of(table, runs[arm.name, 0]))
        assert best.changes == chosen


def test_records_of_a_job_that_was_changed_later_are_refused(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    study = Study("study", (Arm("a", str(job)), Arm("b", str(job), keys(optim__lr="0.2"))), (0,))
    job.write_text(tomli_w.dumps(job_tree(seed=0)))
    runs = {}
    for name, lr in (("a", 0.05), ("b", 0.2)):
        run = write_run(tmp_path, name, 5, 0.9)
        tree = job_tree(seed=3, optim={"lr": lr}) | {"name": "a-seed3"}
        (run / "plan.json").write_text(json.dumps(plan_tree(300, 600, seed=0) | {"job_file": tree}))
        runs[name, 3] = RunFiles.read(run)
    check_jobs(study, runs)
    job.write_text(tomli_w.dumps(job_tree(optim={"momentum": 0.8})))
    with pytest.raises(ValueError, match=r"study/a-seed3 was trained with another optim\.momentum: remove"):
        check_jobs(study, runs)


def test_each_table_has_its_place_in_a_page() -> None:
    assert len({table.name for table in TABLES}) == len(TABLES)
    for table in TABLES:
        assert table.rows
        if table.name != "quick":
            replace_block((ROOT / "docs" / table.page).read_text(), table.name, "new")


def test_seeds_come_one_after_the_other_so_that_all_arms_have_one_early() -> None:
    assert [(task.arm.name, task.seed) for task in tasks_of([STUDY], ())] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [task.seed for task in tasks_of([STUDY], [7])] == [7, 7]
    assert Task(STUDY, STUDY.arms[0], 3).runs == ["a-seed3", "a-seed3-twin"]
    assert Task(STUDY, STUDY.arms[1], 3).runs == ["b-seed3"]


def test_records_are_kept_without_weights_and_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a-seed0", 5, 0.9)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "weights.pt").write_bytes(bytes(1000))
    for folder in ("one", "two"):
        pack(run, tmp_path / folder)
    packed = tmp_path / "one" / "a-seed0.tar.xz"
    assert packed.read_bytes() == (tmp_path / "two" / "a-seed0.tar.xz").read_bytes()
    found = unpack(packed, tmp_path / "there")
    assert sorted(path.name for path in found.rglob("*")) == ["metrics.jsonl", "plan.json"]
    assert (found / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_the_table_has_means_and_paired_intervals(tmp_path: Path) -> None:
    results = tmp_path / "results" / "study"
    for name, updates, accuracy in (
        *(("a-seed0", 10, 0.90), ("a-seed0-twin", 20, 0.91), ("a-seed1", 10, 0.92), ("a-seed1-twin", 20, 0.91)),
        *(("b-seed0", 30, 0.88), ("b-seed1", 40, 0.89)),
    ):
        pack(write_run(tmp_path, name, updates, accuracy), results)
    first, second = markdown(
        Table("t", STUDY, "page.md", with_twins=True), read_runs(STUDY, results.parent)
    ).splitlines()[2:]
    assert first.split(" | ")[:5] == ["| `a`", "2", "600", "10", "91.00 %"]
    # Differences −1 and +1: mean 0, s = √2, and t(0.975, 1) = 12.706 times s/√2 = 1.
    assert first.split(" | ")[6:] == ["20", "91.00 %", "+0.00 (−12.71 to +12.71) |"]
    # −2 and −3: mean −2.5, s = √0.5, and 12.706 · √0.5/√2 = 6.353.
    assert second.split(" | ")[3:6] == ["35", "88.50 %", "−2.50 (−8.85 to +3.85)"]


def test_with_a_margin_the_table_counts_updates_and_tests_equivalence(tmp_path: Path) -> None:
    results = tmp_path / "results" / "study"
    for seed, (first, second) in enumerate(((0.900, 0.9010), (0.910, 0.9105))):
        pack(write_run(tmp_path, f"a-seed{seed}", 30, first), results)
        pack(write_run(tmp_path, f"b-seed{seed}", 20, second), results)
    runs = read_runs(STUDY, results.parent)
    # Differences 0.10 and 0.05: mean 0.075, s/√2 = 0.025. The 90 % interval is 0.075 ± 6.314 · 0.025, up to 0.23.
    for margin, said in ((0.3, ", within ±0.3"), (0.2, "")):
        row = markdown(Table("t", STUDY, "page.md", ("a", "b"), margin=margin), runs).splitlines()[3]
        assert row.split(" | ")[3:] == ["20 (1.50× fewer)", "90.58 %", f"+0.08 (−0.24 to +0.39){said} |"]


def test_a_page_has_the_table_its_figures_and_the_origin_of_its_runs(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    for seed, accuracy in ((0, 0.90), (1, 0.92)):
        run = write_run(tmp_path, f"b-seed{seed}", 20, accuracy)
        attempt = {
            "python": "3.11.7",
            "packages": {"torch": "2.13.0"},
            "hardware": {"device": "CPU"},
            "ranks": 2,
            "git_commit": "0123456789",
        }
        earlier = {**attempt, "ranks": 1, "git_commit": "fedcba9876"}
        (run / "record.json").write_text(json.dumps({"attempts": [earlier, attempt]}))
        pack(run, results / "study")
    table = Table("some_arms", STUDY, "page.md", ("b", "a"), margin=0.3, with_figures=True)
    assert write_table(table, read_runs(STUDY, results), docs) == 2
    page = (docs / "page.md").read_text()
    assert "| `b` | 2 | 600 | 20 | 91.00 % |  |" in page
    assert "- `a`" not in page  # it has no run yet
    assert "jobs/job.toml) with `optim.lr = 0.2`" in page
    assert page.count("- CPU; 2 ranks, Python 3.11.7, torch 2.13.0; commit 0123456\n") == 1
    assert page.count("- CPU; 1 rank, Python 3.11.7, torch 2.13.0; commit fedcba9\n") == 1
    names = re.findall(r"\(figures/(.*?\.svg)\)", page)
    assert sorted(names) == sorted(path.name for path in (docs / "figures").iterdir())
    assert "some-arms-test-accuracy-by-updates.svg" in names
    assert write_table(table, read_runs(STUDY, results), docs) == 2
    assert (docs / "page.md").read_text() == page


def test_a_table_counts_the_updates_of_branches(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a-seed0", 30, 0.9)
    lines = [
        {"kind": "branch", "samples": 100, "factor": k, "global_batch": 128 * k, "end_samples": 4196} for k in (1, 2)
    ]
    (run / "branches.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pack(run, tmp_path / "results" / "study")
    pack(write_run(tmp_path, "b-seed0", 100, 0.9), tmp_path / "results" / "study")
    table = Table("t", STUDY, "page.md", ("b", "a"), margin=0.3)
    row = markdown(table, read_runs(STUDY, tmp_path / "results")).splitlines()[3]
    assert row.split(" | ")[3] == "78 (1.28× fewer)"  # 30 + 4,096 / 128 + 4,096 / 256


def test_a_curve_is_the_mean_of_the_seeds_between_their_extremes(tmp_path: Path) -> None:
    results = tmp_path / "results" / "study"
    for seed, accuracy in ((0, 0.90), (1, 0.94)):
        pack(write_run(tmp_path, f"a-seed{seed}", 20, accuracy), results)
    drawn = study_figures(Table("t", STUDY, "page.md", ("a",)), read_runs(STUDY, results.parent))
    (curve,) = next(figure for figure in drawn if figure.name == "t-test-accuracy-by-updates").curves
    points = curve.points
    assert points.low is not None
    assert points.high is not None
    assert [list(line) for line in (points.x, points.y, points.low, points.high)] == [[20], [92], [90], [94]]


def test_a_single_pair_has_no_interval() -> None:
    assert interval_text(paired_difference([-0.25])) == "−0.25"


def test_a_table_replaces_the_one_between_its_marks() -> None:
    first, last = "<!-- table t: python -m benchmarks.paper write -->\n", "<!-- end of table t -->\n"
    assert replace_block(f"before\n{first}old\n{last}after\n", "t", "new") == f"before\n{first}new\n{last}after\n"
    with pytest.raises(ValueError, match="lacks the marks of table u"):
        replace_block(first + last, "u", "new")


@pytest.fixture
def small_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two arms that train in seconds."""
    monkeypatch.setattr(training, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "jobs").mkdir()
    write_idx_folder(tmp_path / "data", small_source())
    (tmp_path / "jobs" / "job.toml").write_text(tomli_w.dumps(job_tree("data")))
    return STUDY


@pytest.mark.slow
def test_what_is_missing_is_trained_and_kept(
    small_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    tasks = list(tasks_of([small_study], [0]))
    assert Trainer(tmp_path / "work", results).train_all(tasks, 2) == 0
    assert re.search(r"\d\d:\d\d 2 of 2: study/[ab]-seed0: kept\n$", capsys.readouterr().out)
    assert all(task.is_kept(results) for task in tasks)
    runs = read_runs(small_study, results)
    assert set(runs) == {("a", 0), ("a-twin", 0), ("b", 0)}
    assert all(run.is_finished for run in runs.values())
    assert runs["b", 0].job["optim"]["lr"] == 0.2


@pytest.mark.slow
def test_an_interrupted_training_resumes(small_study: Study, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks.paper import training\n"
        "from tests.unit.test_paper import STUDY\n"
        "training.ROOT = Path.cwd()\n"
        "tasks = list(training.tasks_of([STUDY], [0]))[:1]\n"
        "sys.exit(training.Trainer(Path('work'), Path('results')).train_all(tasks, 1))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    record = tmp_path / "work/study/a-seed0/metrics.jsonl"
    while not record.exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1, printed
    assert "stopped; the next invocation resumes it" in printed
    task = next(tasks_of([small_study], [0]))
    assert Trainer(tmp_path / "work", tmp_path / "results").train_all([task], 1) == 0
    assert task.is_kept(tmp_path / "results")
    assert STOPPED == 75
