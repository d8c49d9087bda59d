"""Comparisons of runs: what they state follows from the files of the runs."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hvd_batchgrow.cli import main
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.observers.comparison_tables import comparison_tree, print_comparison
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.results.comparison import Comparison, compare_runs, final_result, group_runs
from hvd_batchgrow.results.confounds import find_confounds
from hvd_batchgrow.results.outcomes import Outcomes, read_outcomes, write_outcomes
from hvd_batchgrow.results.records import base_name
from hvd_batchgrow.results.run_cost import RunCost
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_summary import read_runs
from hvd_batchgrow.results.sample_test import SampleTest, sample_test
from hvd_batchgrow.storage.strict_json import dump_json
from tests.helpers import plan_tree, small_job

N, END = 100, 400


def write_run(
    folder: Path, seed: int, top1: float | None, policy: str = "grow", *, done: int = END, n: int = N, **job: Any
) -> RunFiles:
    """Write a run of 4 epochs with an evaluation after each: its accuracy rises by 0.1 per epoch to `top1`."""
    folder.mkdir(parents=True)
    schedule = {"policy": policy} | job.pop("schedule", {})
    ranks, batch = job.pop("ranks", 2), 10 if policy == "decay" else 20
    plan = plan_tree(n, END, seed=seed, schedule=schedule, **job)
    plan["phases"][0]["global_batch"] = batch
    (folder / "plan.json").write_text(json.dumps({**plan, "job": folder.name}))
    lines: list[dict[str, Any]] = []
    for samples in range(N, done + 1, N):
        speed = {"ranks": ranks, "samples_per_s": 50.0, "updates": samples // batch}
        lines.append({"kind": "train", "samples": samples, "loss": 1.0, **speed})
        value = None if top1 is None else top1 - 0.001 * (END - samples)
        lines.append({"kind": "eval", "samples": samples, "loss": 0.5, "top1": value, "dataset": "test"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "record.json").write_text(json.dumps({"attempts": [{"ranks": ranks, "packages": {"torch": "2.13"}}]}))
    return RunFiles.read(folder)


def pairs(folder: Path, differences: list[float], **job: Any) -> list[RunFiles]:
    """Write pairs of runs whose accuracies differ by these percentage points, from the seed 5 on."""
    runs = []
    for seed, difference in enumerate(differences, 5):
        runs.append(write_run(folder / f"job-seed{seed}", seed, 0.8 + difference / 100, **job))
        runs.append(write_run(folder / f"job-seed{seed}-twin", seed, 0.8, "decay", **job))
    return runs


def compared(runs: list[RunFiles], margin: float | None = None, **options: Any) -> Comparison:
    (found,) = compare_runs(runs, margin, **options)
    return found


def test_pairs_of_a_seed_are_compared_in_percentage_points(tmp_path: Path) -> None:
    found = compared(pairs(tmp_path, [0.3, -0.1, 0.4]), 1.0)
    assert (found.first.name, found.second.name) == ("job", "job-twin")
    assert (found.metric, found.dataset, found.unit) == ("top1", "test", "points")
    assert [pair.seed for pair in found.pairs] == [5, 6, 7]
    assert [pair.first for pair in found.pairs] == pytest.approx([80.3, 79.9, 80.4])
    assert [pair.difference for pair in found.pairs] == pytest.approx([0.3, -0.1, 0.4])
    assert found.difference is not None
    interval = stats.ttest_1samp([0.3, -0.1, 0.4], 0).confidence_interval(0.95)
    assert found.difference.mean == pytest.approx(0.2)
    assert [found.difference.low, found.difference.high] == pytest.approx([*interval])
    assert found.confounds == ()


@pytest.mark.parametrize(
    ("differences", "margin", "begins", "holds"),
    [
        ([0.1, -0.1, 0.05, 0.0], 0.3, "equivalent within 0.3 points: test accuracy of job minus job-twin is ", "n = 4"),
        ([0.9, 1.1, 1.0], 0.3, "differs: test accuracy of job minus job-twin is +1.00 points (95 % interval", "n = 3"),
        ([0.9, 1.1, 1.0], None, "differs: ", "+0.75 to +1.25 points, n = 3 pairs"),
        (
            [0.9, -1.1, 0.2],
            0.3,
            "not shown: ",
            "is wider than the margin of ±0.3 points; if the true difference is 0, showing",
        ),
        (
            [0.25, 0.5, -0.05, 0.2, 0.26],
            0.3,
            "not shown: ",
            "reaches beyond the margin of ±0.3 points; ",
        ),
        ([0.9, -1.1, 0.2], None, "not shown: ", "no margin of equivalence was stated"),
        ([0.9], 0.3, "not shown: n = 1 (seed 5)", "train more seeds"),
        ([0.1, 0.1], 0.3, "not shown: all 2 pairs have the same difference", "train more seeds (twin --seeds 3)"),
        ([0.0, 0.0], 0.1, "equivalent within 0.1 points: ", "+0.00 to +0.00 points"),
    ],
)
def test_the_verdict(tmp_path: Path, differences: list[float], margin: float | None, begins: str, holds: str) -> None:
    verdict = compared(pairs(tmp_path, differences), margin).verdict()
    assert verdict.startswith(begins)
    assert holds in verdict
    assert "\n" not in verdict


def test_the_verdict_says_how_many_more_pairs_are_needed(tmp_path: Path) -> None:
    found = compared(pairs(tmp_path, [0.9, -1.1, 0.2]), 0.5)
    assert found.equivalence is not None
    assert found.equivalence.pairs_needed is not None
    # The formula (t(0.95, n - 1) + t(0.9, n - 1))² s² / δ², iterated, and 1 or 2 more.
    s, n = float(np.std([0.9, -1.1, 0.2], ddof=1)), 10.0
    for _ in range(50):
        n = ((stats.t.ppf(0.95, n - 1) + stats.t.ppf(0.9, n - 1)) * s / 0.5) ** 2
    assert abs(found.equivalence.pairs_needed - n) <= 2
    more = found.equivalence.pairs_needed - 3
    assert found.more_pairs == more
    assert f"if the true difference is 0, showing equivalence needs about {more} more pairs" in found.verdict()


def test_a_metric_in_its_own_unit(tmp_path: Path) -> None:
    found = compared(pairs(tmp_path, [0.1, 0.2]), 0.01, metric="loss")
    assert (found.unit, [pair.first for pair in found.pairs]) == ("", [0.5, 0.5])
    assert found.verdict().startswith("equivalent within 0.01: test loss of job minus job-twin is ")


def test_unpaired_runs_are_not_counted_and_a_note_names_them(tmp_path: Path) -> None:
    runs = pairs(tmp_path / "a", [0.1, 0.2])
    runs.append(write_run(tmp_path / "job-seed1", 1, 0.9))  # no partner
    runs.append(write_run(tmp_path / "job-seed9", 9, 0.9))
    runs.append(write_run(tmp_path / "job-seed9-twin", 9, 0.1, "decay", done=200))  # unfinished
    runs.append(write_run(tmp_path / "again", 5, 0.1))
    runs.append(write_run(tmp_path / "job-seed8", 8, 0.9))
    runs.append(write_run(tmp_path / "job-seed8-twin", 8, None, "decay"))  # NaN is written as null
    found = compared(runs)
    assert [pair.seed for pair in found.pairs] == [5, 6]
    notes = "\n".join(found.notes)
    assert "job-seed1 is not counted: the other job has no run of seed 1" in notes
    assert "job-seed9-twin is not counted: it has done 2.00 of 4.00 epochs" in notes
    assert "again is not counted: another run of seed 5 is counted" in notes
    why = "the runs of seed 8 do not both have a finite result and a finite loss at their end"
    assert f"job-seed8-twin is not counted: {why}" in notes


def test_without_a_common_seed_nothing_is_shown(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 1, 0.9), write_run(tmp_path / "b", 2, 0.1, "decay")]
    found = compared(runs, 0.3)
    assert (found.pairs, found.difference, found.equivalence, found.curves) == ((), None, None, None)
    assert found.verdict() == "not shown: no seed has a finished run of both jobs"
    assert len(found.notes) == 2


def test_a_run_without_an_evaluation_at_its_end_has_no_result(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 1, 0.9)
    assert final_result(run, "top1", "test") == 0.9
    early = replace(run, evaluations=run.evaluations[:-1])
    assert early.is_finished
    assert final_result(early, "top1", "test") is None


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        (1152, ("the runs trained on 960 and 1,152 samples, which differ by more than a batch",)),
        (1056, ()),
    ],
)
def test_more_samples_than_a_batch_confound(tmp_path: Path, samples: int, found: tuple[str, ...]) -> None:
    runs = []
    for name, trained in (("a", 960), ("b", samples)):
        run = write_run(tmp_path / name, 1, 0.9)
        phase = {**run.plan["phases"][0], "global_batch": 96}
        counter = {**run.train, "samples": np.array([float(trained)])}
        runs.append(replace(run, plan={**run.plan, "phases": [phase]}, train=counter))
    assert find_confounds([(runs[0], runs[1])], "top1") == found


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"n": 200}, "the training sets differ: N = 100 and 200 samples, so the streams differ too"),
        ({"data": {"hflip": True}}, "the jobs also differ in data.hflip"),
        ({"update": {"precision": "bfloat16"}}, "the jobs also differ in update.precision"),
        ({"evaluation": {"batch_size": 7}, "logging": {"logs_per_epoch": 3}}, None),
    ],
)
def test_confounds(tmp_path: Path, change: dict[str, Any], wanted: str | None) -> None:
    runs = [write_run(tmp_path / "a", 1, 0.9), write_run(tmp_path / "b", 1, 0.1, "decay", **change)]
    found = compared(runs)
    assert found.confounds == ((wanted,) if wanted else ())
    assert found.verdict().endswith("(confounded: the arms also differ in other respects)") == bool(wanted)


def test_losses_that_are_computed_in_another_way_are_confounded(tmp_path: Path) -> None:
    """The weighted mean of losses is another quantity; the accuracy is not."""
    runs = [write_run(tmp_path / "a", 1, 0.9), write_run(tmp_path / "b", 1, 0.9, task={"class_weights": [1.0, 2.0]})]
    pair = [(runs[0], runs[1])]
    assert find_confounds(pair, "top1") == ()
    fault = "the losses are not the same quantity: the jobs differ in task.class_weights"
    assert find_confounds(pair, "loss") == find_confounds(pair, "average_loss") == (fault,)


def test_an_arm_has_the_name_of_a_finished_run(tmp_path: Path) -> None:
    stopped, done = (write_run(tmp_path / name, 1, 0.9) for name in ("first", "second"))
    stopped = replace(stopped, train={**stopped.train, "samples": np.array([96.0])}, evaluations=())
    assert [arm.name for arm in group_runs([stopped, done])] == ["second"]
    assert [arm.name for arm in group_runs([stopped])] == ["first"]


def test_a_single_key_is_what_is_compared_and_two_are_confounded(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "a", 1, 0.9)
    assert compared([plain, write_run(tmp_path / "b", 1, 0.8, data={"hflip": True})]).confounds == ()
    both: dict[str, Any] = {"data": {"hflip": True}, "update": {"precision": "bfloat16"}}
    found = compared([plain, write_run(tmp_path / "c", 1, 0.8, **both)])
    assert found.confounds == ("the jobs also differ in data.hflip, update.precision",)


def test_training_data_of_the_same_size_that_differ_are_a_confound(tmp_path: Path) -> None:
    data = {"mean": [0.5, 2.0], "std": [1.0, 1.0], "targets_sha256": "ab" * 32}
    other = {**data, "mean": [0.5, 200.0], "targets_sha256": "cd" * 32}

    def against(recorded: dict[str, Any], name: str, **job: Any) -> tuple[str, ...]:
        folder = tmp_path / name
        runs = [write_run(folder / "a", 1, 0.9), write_run(folder / "b", 1, 0.1, "decay", **job)]
        for run, values in zip(runs, (data, recorded), strict=True):
            record = json.loads((run.folder / "record.json").read_text())
            (run.folder / "record.json").write_text(json.dumps({**record, "data": values}))
        return compared([RunFiles.read(run.folder) for run in runs]).confounds

    fault = "the training data differ: mean[1] 2 and 200; the targets (SHA-256) abababababab… and cdcdcdcdcdcd…"
    assert against(other, "b") == (fault,)
    assert against({**data, "mean": [0.5, 2.0000001]}, "c") == ()
    assert against({}, "older") == ()
    assert against(other, "d", data={"hflip": True}) == ("the jobs also differ in data.hflip",)  # it may be the reason


def test_other_ranks_are_noted(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 1, 0.9), write_run(tmp_path / "b", 1, 0.1, "decay", ranks=4)]
    found = compared(runs)
    assert "the ranks differ, which changes the weights by rounding only: 2 and 4" in found.notes
    assert found.confounds == ()


def test_each_twin_of_an_adaptive_job_follows_its_own_decisions_and_they_are_one_arm(tmp_path: Path) -> None:
    runs = []
    for seed in (1, 2, 3):
        runs.append(write_run(tmp_path / f"job-seed{seed}", seed, 0.9, "adaptive"))
        schedule = {"boundaries_epochs": [seed]}
        runs.append(write_run(tmp_path / f"job-seed{seed}-twin", seed, 0.9, "decay", schedule=schedule))
    found = compared(runs, 0.3)
    assert [pair.seed for pair in found.pairs] == [1, 2, 3]
    assert "the schedule is adaptive: each pair has its own, decided in its run" in found.notes


def test_each_job_is_compared_with_the_first(tmp_path: Path) -> None:
    runs = pairs(tmp_path, [0.1, 0.2])
    others = [write_run(tmp_path / f"seesaw-{seed}", seed, 0.5, "seesaw") for seed in (5, 6)]
    found = compare_runs([*runs, *others], 0.3)
    assert [(each.first.name, each.second.name) for each in found] == [("job", "job-twin"), ("job", "seesaw-5")]


def test_a_job_with_another_task_is_skipped(tmp_path: Path) -> None:
    runs = pairs(tmp_path, [0.1, 0.2])
    other = write_run(tmp_path / "rows", 5, 0.5, task={"name": "regression"})
    (found,) = compare_runs([*runs, other], 0.3)
    assert found.second.name == "job-twin"
    fault = "job has the task 'classification' and rows 'regression': no common result"
    assert f"a job is not compared: {fault}" in found.notes
    with pytest.raises(RunError, match=f"^{fault}$"):
        compare_runs([runs[0], other], 0.3)


def test_an_unfinished_job_with_a_validation_set_does_not_stop_the_others(tmp_path: Path) -> None:
    runs = pairs(tmp_path, [0.1, 0.2])
    half = write_run(tmp_path / "half", 5, 0.5, "seesaw", done=200)
    lines = tuple({**line, "dataset": "validation"} for line in half.evaluations)  # the test comes at the end
    found = compare_runs([*runs, replace(half, evaluations=lines)], 0.3)
    assert [len(each.pairs) for each in found] == [2, 0]
    assert found[1].verdict() == "not shown: no seed has a finished run of both jobs"


def test_of_two_runs_of_a_seed_the_one_with_a_result_is_counted(tmp_path: Path) -> None:
    diverged, good = write_run(tmp_path / "a", 1, None), write_run(tmp_path / "b", 1, 0.9)
    found = compared([diverged, good, write_run(tmp_path / "c", 1, 0.8, "decay")])
    assert [pair.first_run.name for pair in found.pairs] == ["b"]
    assert f"{diverged.folder} is not counted: another run of seed 1 is counted" in found.notes


def test_twins_follow_the_adaptive_run_in_their_own_folder(tmp_path: Path) -> None:
    runs = []
    for folder, hflip in (("A", False), ("B", True)):
        runs.append(write_run(tmp_path / folder / "job-seed1", 1, 0.9, "adaptive", data={"hflip": hflip}))
        runs.append(write_run(tmp_path / folder / "job-seed1-twin", 1, 0.9, "decay", data={"hflip": hflip}))
    assert [[run.folder.parent.name for run in arm.runs] for arm in group_runs(runs)] == [["A"], ["A"], ["B"], ["B"]]


def test_arms_of_one_name_are_distinguished_by_their_policies(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a" / "job", 1, 0.9), write_run(tmp_path / "b" / "job", 1, 0.9, "decay")]
    assert compared(runs).second.name == "job (decay)"
    runs.append(write_run(tmp_path / "c" / "job", 1, 0.9, "decay", data={"hflip": True}))
    assert [found.second.name for found in compare_runs(runs, None)] == ["job (decay)", "job (2)"]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("a-seed3", "a"),
        ("a-seed31-twin", "a-twin"),
        ("a-twin", "a-twin"),
        ("a-seed3-b", "a-seed3-b"),
        ("seed3", "seed3"),
    ],
)
def test_the_name_of_an_arm_has_no_seed(name: str, base: str) -> None:
    assert base_name(name) == base


def test_curves_are_compared_at_equal_samples(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", 1, 0.8), write_run(tmp_path / "b", 1, 0.8, "decay")
    # The second run is evaluated at other samples: on the line through 0.5 at epoch 1 and 0.9 at epoch 4.2.
    epochs = np.array([1.0, 2.1, 2.6, 3.3, 4.2])
    lines = [
        {"kind": "eval", "samples": round(N * e), "top1": 0.5 + (e - 1) / 8, "dataset": "test", "updates": 7}
        for e in epochs
    ]
    (second.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = compared([first, RunFiles.read(second.folder)]).curves
    assert curves is not None
    wanted = [100 * (value - (0.5 + (e - 1) / 8)) for e, value in ((1, 0.5), (2, 0.6), (3, 0.7), (4, 0.8))]
    assert curves.epochs == (1.0, 2.0, 3.0, 4.0)
    assert curves.differences == pytest.approx(wanted)  # 0, -2.5, -5, -7.5
    assert curves.mean == pytest.approx(3.75)
    assert [*curves.largest] == pytest.approx([4.0, -7.5])
    assert curves.apart(2.0) == ((2.0, 4.0),)
    assert curves.apart(5.1) == ((4.0, 4.0),)
    assert curves.apart(8.0) == ()


def test_curves_of_unequal_training_sets_are_compared_by_samples(tmp_path: Path) -> None:
    """The defect: they were compared at equal epochs, which have other numbers of samples."""
    runs = [write_run(tmp_path / "a", 5, 0.9), write_run(tmp_path / "b", 5, 0.9, "decay", n=2 * N)]
    found = compared(runs, 1.0)
    assert found.curves is not None
    assert (found.curves.samples, found.curves.epochs) == ((100, 200, 300, 400), None)
    assert found.curves.differences == (0.0, 0.0, 0.0, 0.0)
    out = io.StringIO()
    print_comparison(PlainConsole(out, 100), found)
    assert "by sample: 0.00 points apart on average, at most +0.00 points at sample 100\n" in out.getvalue()


def test_curves_that_part_and_meet_again(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", 1, 0.8), write_run(tmp_path / "b", 1, 0.8, "decay")
    lines = [json.loads(line) for line in (first.folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["top1"] = line.get("top1", 0.0) + (0.02 if line["samples"] in {100, 300} else 0.0)
    (first.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = compared([RunFiles.read(first.folder), second]).curves
    assert curves is not None
    assert curves.apart(1.0) == ((1.0, 1.0), (3.0, 3.0))


def test_the_cost_of_a_run(tmp_path: Path) -> None:
    cost = RunCost.of(write_run(tmp_path / "a", 1, 0.8, ranks=3))
    assert (cost.updates, cost.samples, cost.seconds) == (20, 400, 8.0)  # 400 samples at 50 samples/s
    assert cost.rank_hours == pytest.approx(3 * 8 / 3600)


def test_keys_that_are_newer_than_a_run_are_no_difference(tmp_path: Path) -> None:
    """Runs of one job: the first three were recorded before some keys existed, and checks change no weight."""
    runs = []
    for seed, twin in ((1, False), (2, False), (2, True), (3, False), (3, True)):
        run = write_run(tmp_path / f"job-seed{seed}{'-twin' * twin}", seed, 0.8)
        job = small_job(seed=seed, checks={"replay_every": seed}).model_dump(mode="json")
        job["schedule"]["noise_factor"] = 5.0 - twin
        if seed < 3:
            del job["checks"], job["model"]["shakedrop"]
        plan = json.loads((run.folder / "plan.json").read_text())
        (run.folder / "plan.json").write_text(json.dumps(plan | {"job_file": job}))
        runs.append(RunFiles.read(run.folder))
    found = compared(runs)
    assert [len(found.first.runs), len(found.second.runs)] == [3, 2]
    assert found.confounds == ()


def outcomes(*right: int) -> Outcomes:
    correct = np.isin(np.arange(10), right)
    return Outcomes(END, np.where(correct, 0.1, 3.0).astype(np.float32), correct)


def test_mcnemar_counts_the_samples_on_which_only_one_network_is_right(tmp_path: Path) -> None:
    first, second = pairs(tmp_path, [0.1])
    write_outcomes(first.folder, outcomes(0, 1, 2, 3, 4, 5))
    write_outcomes(second.folder, outcomes(0, 9))
    (pair,) = compared([first, second]).pairs
    assert pair.samples is not None
    assert (pair.samples.num_samples, pair.samples.only_first, pair.samples.only_second) == (10, 5, 1)
    assert pair.samples.p == pytest.approx(stats.binomtest(1, 6).pvalue)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (None, "job-twin has no outcomes.npz"),
        (
            Outcomes(END, np.zeros(10, np.float32)),
            "job-twin has no array 'correct' in outcomes.npz: ",
        ),
        (Outcomes(300, np.zeros(10, np.float32), np.ones(10, np.bool_)), "is from sample 300, and the run ends at 400"),
        (Outcomes(END, np.zeros(9, np.float32), np.ones(9, np.bool_)), "the test sets differ: 10 and 9 samples"),
    ],
)
def test_why_mcnemar_is_not_available(tmp_path: Path, other: Outcomes | None, why: str) -> None:
    first, second = pairs(tmp_path, [0.1])
    write_outcomes(first.folder, outcomes(0))
    if other is not None:
        write_outcomes(second.folder, other)
    found = compared([first, second])
    assert found.pairs[0].samples is None
    assert any(note.startswith("McNemar's test is not available: ") and why in note for note in found.notes)


def test_skipped_samples_do_not_count(tmp_path: Path) -> None:
    first, second = pairs(tmp_path, [0.5])
    losses = np.zeros(10, np.float32)
    losses[:3] = np.nan  # the first network skipped three bad samples, of which the other is right on two
    write_outcomes(first.folder, replace(outcomes(3, 4), losses=losses))
    write_outcomes(second.folder, outcomes(0, 1, 3, 5))
    found = sample_test(first, second)
    assert isinstance(found, SampleTest)
    assert (found.num_samples, found.only_first, found.only_second) == (7, 1, 1)


def test_outcomes_survive_the_file(tmp_path: Path) -> None:
    weights = np.linspace(0, 1, 10, dtype=np.float32)
    write_outcomes(tmp_path, Outcomes(7, weights, None, weights))
    found = read_outcomes(tmp_path)
    assert found is not None
    assert (found.samples, found.correct) == (7, None)
    np.testing.assert_array_equal(found.losses, weights)
    np.testing.assert_array_equal(found.weights, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["outcomes.npz"]


def saved(path: Path, **arrays: Any) -> None:
    np.savez_compressed(path / "outcomes.npz", **arrays)


def test_damaged_outcomes_are_reported(tmp_path: Path) -> None:
    path, losses = tmp_path / "outcomes.npz", np.zeros(3, np.float32)
    write_outcomes(tmp_path, outcomes(1))
    good = path.read_bytes()
    for content in (b"", b"PK", b"no archive", good[:-30], good[: len(good) // 2], good.replace(b"losses", b"lessos")):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"outcomes.npz is damaged"):
            read_outcomes(tmp_path)
    trees: list[dict[str, Any]] = [
        {"samples": np.int64(1), "losses": np.array([{}], object)},  # pickled: not read
        {"samples": np.int64(1), "losses": losses.astype(np.float64)},
        {"samples": np.int64(1), "losses": losses, "correct": np.ones(4, np.bool_)},
        {"samples": np.array([1, 2]), "losses": losses},
        {"losses": losses},
    ]
    for arrays in trees:
        saved(tmp_path, **arrays)
        with pytest.raises(RunError, match=r"outcomes.npz is damaged"):
            read_outcomes(tmp_path)
    for k in range(0, len(good), 3):  # every byte may be another: read, or reported
        path.write_bytes(good[:k] + bytes([good[k] ^ 0x55]) + good[k + 1 :])
        try:
            read_outcomes(tmp_path)
        except RunError as error:
            assert "outcomes.npz" in str(error)  # noqa: PT017


def test_a_folder_in_place_of_outcomes(tmp_path: Path) -> None:
    (tmp_path / "outcomes.npz").mkdir()
    with pytest.raises(RunError, match=r"outcomes.npz cannot be read: Is a directory"):
        read_outcomes(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["compare", *map(str, words)]) == code
    streams = capsys.readouterr()
    return streams.out, streams.err


def test_the_command_ends_with_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = pairs(tmp_path, [0.9, -1.1, 0.2])
    for run, right in zip(runs, ([0, 1], [1], [2], [2], [3], [4, 5]), strict=True):
        write_outcomes(run.folder, outcomes(*right))
    out, err = printed(capsys, tmp_path, "--margin", 0.5)
    assert err == ""
    assert out.splitlines()[-1].startswith("verdict: not shown: test accuracy of job minus job-twin is ")
    assert "second / first    2.00×    1.00×     1.00×       1.00×" in out
    (row,) = [line.split() for line in out.splitlines() if line.strip().startswith("7 ")]
    assert row == ["7", "80.20", "%", "80.00", "%", "+0.20", "1", "2", "1"]
    tree = json.loads(printed(capsys, tmp_path, "--margin", 0.5, "--json")[0])
    assert tree["verdict"] == out.splitlines()[-1].removeprefix("verdict: ")
    assert [pair["difference"] for pair in tree["pairs"]] == pytest.approx([0.9, -1.1, 0.2])
    assert tree["pairs"][2]["mcnemar"] == {"num_samples": 10, "only_first": 1, "only_second": 2, "p": 1.0}


def test_without_outcomes_the_table_has_no_columns_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs(tmp_path, [0.1, 0.2])
    out, _ = printed(capsys, tmp_path)
    assert ("McNemar's p" in out, "only" in out) == (False, False)
    (row,) = [line.split() for line in out.splitlines() if line.strip().startswith("6 ")]
    assert row == ["6", "80.20", "%", "80.00", "%", "+0.20"]


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = pairs(tmp_path / "runs", [0.1])
    other = write_run(tmp_path / "other", 5, 0.5, task={"name": "regression"})
    first = runs[0].folder
    assert "got 1 run of 1 job" in printed(capsys, first, code=1)[1]
    assert "got 1 run of 1 job" in printed(capsys, first, f"{first}/../{first.name}", code=1)[1]
    assert "has the task 'classification' and other 'regression'" in printed(capsys, first, other.folder, code=1)[1]
    out = printed(capsys, tmp_path / "runs", "--metric", "f1", code=1)[1]
    assert "job has no f1 of the test set on record: it has loss, top1 (accuracy)" in out
    out = printed(capsys, tmp_path / "runs", "--dataset", "validation", code=1)[1]
    assert "job has no evaluation of the validation set on record" in out
    assert "--margin" in printed(capsys, tmp_path / "runs", "--margin", -1, code=2)[1]
    assert "is not a folder" in printed(capsys, tmp_path / "nowhere", code=1)[1]


def test_damaged_runs_are_reported_and_the_others_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = pairs(tmp_path, [0.1, 0.3, 0.2])
    (runs[0].folder / "plan.json").write_text("{")
    (runs[2].folder / "record.json").write_text("[]")
    out, err = printed(capsys, tmp_path, "--margin", 1, code=1)
    assert "plan.json cannot be read" in err
    assert "note: " in out
    assert "record.json is damaged" in out
    assert out.splitlines()[-1].startswith("verdict: equivalent within 1 point:")
    assert "n = 2 pairs" in out


HOSTILE: list[Any] = [None, [], {}, "x", "1", True, 10**400, -(10**18), -1, 1e308, "[red]x[/red]", [[1]], {"a": {}}]


def survives(folder: Path) -> None:
    """Compare all runs of a folder and print the result; faults are sentences."""
    with suppress(RunError):
        runs, _ = read_runs([folder])
        for found in compare_runs(runs, 1.0):
            print_comparison(PlainConsole(io.StringIO(), 140), found)
            assert json.loads(dump_json(comparison_tree(found)))["verdict"] == found.verdict()


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_no_value_in_a_record_crashes_a_comparison(tmp_path: Path, value: Any) -> None:
    runs = pairs(tmp_path, [0.1, 0.2])
    survives(tmp_path)
    path = runs[0].folder / "metrics.jsonl"
    before = path.read_text()
    for name in ("samples", "top1", "dataset", "samples_per_s", "ranks", "updates", "kind"):
        lines = [json.loads(line) for line in before.splitlines()]
        path.write_text("".join(json.dumps({**line, name: value}) + "\n" for line in lines))
        survives(tmp_path)
    path.write_text(before)
    plan = json.loads((runs[0].folder / "plan.json").read_text())
    for key in ("task", "data", "schedule", "seed"):
        hostile = {**plan, "num_validation": value, "job_file": {**plan["job_file"], key: value}}
        (runs[0].folder / "plan.json").write_text(json.dumps(hostile))
        survives(tmp_path)
    (runs[2].folder / "record.json").write_text(json.dumps({"attempts": [{"packages": value, "ranks": value}]}))
    survives(tmp_path)


@pytest.mark.parametrize("depth", [100, 500, 900, 980, 5000])
def test_a_deeply_nested_job_crashes_nothing(tmp_path: Path, depth: int) -> None:
    runs = pairs(tmp_path, [0.1, 0.2])
    path = runs[0].folder / "plan.json"
    deep = '{"a": ' * depth + "1" + "}" * depth
    path.write_text(path.read_text().replace('"seed": 5', f'"seed": 5, "x": {deep}'))
    survives(tmp_path)


def test_pairs_that_suffice_but_are_not_centered(tmp_path: Path) -> None:
    found = compared(pairs(tmp_path, [0.68, -0.17, 0.58, -0.12, 0.63, -0.02, 0.58, -0.17, 0.70]), 0.5)
    assert found.equivalence is not None
    assert (found.equivalence.pairs_needed, found.more_pairs) == (8, 0)
    assert "reaches beyond the margin of ±0.5 points; if the true difference is 0, " in found.verdict()


def test_control_characters_of_a_record_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, second = pairs(tmp_path, [0.1])
    text = (second.folder / "plan.json").read_text()
    escape = "\\u001b[31m"
    text = text.replace('"job": "job', f'"job": "{escape}').replace('"seed": 5', f'"seed": 5, "{escape}": 1')
    (second.folder / "plan.json").write_text(text)
    for words in ((), ("--metric", "loss"), ("--json",)):
        assert "\x1b" not in "".join(printed(capsys, tmp_path, *words))
    assert "\\x1b[31m" in printed(capsys, tmp_path)[0]


def test_outcomes_are_those_of_the_test_set_and_of_the_weights_themselves(tmp_path: Path) -> None:
    runs = pairs(tmp_path, [0.1])
    for run in runs:
        write_outcomes(run.folder, outcomes(0, 1))
        text = (run.folder / "metrics.jsonl").read_text()
        (run.folder / "metrics.jsonl").write_text(text.replace('"top1"', '"average_top1"'))
    found = compared([RunFiles.read(run.folder) for run in runs], metric="average_top1")
    assert (found.unit, found.pairs[0].samples) == ("points", None)


def test_compare_without_folders_says_what_to_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert "FOLDERS: name the folders of at least two runs, or a folder of runs such as runs" in capsys.readouterr().err
