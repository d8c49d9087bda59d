"""Confounds and notes of comparisons: forks, several invocations, test sets, and facts that concern several pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_batchgrow.results.comparison import final_result
from hvd_batchgrow.results.confounds import find_confounds
from hvd_batchgrow.results.live_plan import LivePlan
from hvd_batchgrow.results.live_state import LiveState
from hvd_batchgrow.results.outcomes import Outcomes, write_outcomes
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_summary import read_summary
from hvd_batchgrow.results.sample_test import sample_test
from tests.reported_runs import change_json, change_lines
from tests.unit.test_comparison import END, compared, pairs, write_run

LR = {"optim.lr": [0.1, 0.05]}


def forked(run: RunFiles, origin: str, samples: int = 200, changed: dict[str, Any] | None = None) -> RunFiles:
    """Make a run a fork, as `train --fork` records it."""
    tree = {"run": f"/data/{origin}", "samples": samples, "changed": LR if changed is None else changed}
    change_json(run.folder / "record.json", lambda record: record.update(forked_from=tree))
    return RunFiles.read(run.folder)


def test_a_fork_is_a_confound(tmp_path: Path) -> None:
    """The defect: a fork was compared as if its job had trained it from the start."""
    base, fork = write_run(tmp_path / "base-seed0", 0, 0.9), write_run(tmp_path / "f-seed0", 0, 0.8, "decay")
    assert compared([base, fork]).confounds == ()
    found = compared([base, forked(fork, "base-seed0", 2752)])
    assert found.confounds == ("f continues base from sample 2,752; optim.lr was 0.1",)
    assert "(confounded: " in found.verdict()


def test_a_fork_without_a_change_and_two_forks_of_one_checkpoint_are_no_confound(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 0, 0.9, policy) for name, policy in (("a", "grow"), ("b", "decay"))]
    assert find_confounds([(runs[0], forked(runs[1], "c", changed={}))], "top1") == ()
    first, second = forked(runs[0], "c"), forked(runs[1], "c", changed={"optim.lr": [0.1, 0.2]})
    assert find_confounds([(first, second)], "top1") == ()
    assert len(find_confounds([(first, forked(runs[1], "c", 300))], "top1")) == 2


def test_of_two_runs_of_a_seed_the_one_that_is_not_a_fork_is_counted(tmp_path: Path) -> None:
    fork = forked(write_run(tmp_path / "a", 1, 0.7), "c")
    plain, other = write_run(tmp_path / "b", 1, 0.9), write_run(tmp_path / "twin", 1, 0.8, "decay")
    assert [pair.first_run.name for pair in compared([fork, plain, other]).pairs] == ["b"]
    half = write_run(tmp_path / "half", 1, 0.9, done=200)
    assert [pair.first_run.name for pair in compared([fork, half, other]).pairs] == ["a"]


def test_damaged_values_of_a_fork_crash_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 1, 0.9)
    trees: list[Any] = [None, [], "x", {}, {"run": 5, "samples": "x", "changed": {"a": 1, "b": [1], "c": [1, "\x1b"]}}]
    for tree in trees:
        change_json(run.folder / "record.json", lambda record, tree=tree: record.update(forked_from=tree))  # type: ignore[misc]
        origin = RunFiles.read(run.folder).forked_from
        assert (origin is None) == (not isinstance(tree, dict))
        assert origin is None or origin.samples == 0


def without_losses(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last evaluation has a loss that is not finite, which is written as null, and an accuracy."""
    return [*lines[:-1], {**lines[-1], "loss": None, "top1": 0.95}]


def test_an_evaluation_whose_loss_is_not_finite_has_no_result(tmp_path: Path) -> None:
    """The defect: a network that computes NaN has the accuracy of always the first class, which was counted."""
    for name, change in (
        ("loss", without_losses),
        ("average", lambda lines: [*lines[:-1], {**lines[-1], "top1": 0.95, "average_loss": None}]),
    ):
        run = write_run(tmp_path / name, 1, 0.9)
        change_lines(run.folder / "metrics.jsonl", change)
        run = RunFiles.read(run.folder)
        assert final_result(run, "top1", "test") is None
        summary = read_summary(run.folder)
        assert (summary.last, summary.best) == (None, 0.8)  # the accuracy rises by 0.1 per epoch
        state = LiveState(LivePlan.of(run.plan))
        for line in (run.folder / "metrics.jsonl").read_text().splitlines():
            state.add(json.loads(line))
        best, last = state.view().best, state.view().last
        assert best is not None
        assert (best.value("top1"), best.samples) == (0.8, 300)
        assert last is not None
        assert (last.value("top1"), last.samples) == (None, END)


def with_attempts(run: RunFiles, values: Sequence[dict[str, Any]]) -> RunFiles:
    change_json(run.folder / "record.json", lambda record: record.update(attempts=list(values)))
    return RunFiles.read(run.folder)


def test_notes_on_ranks_and_commits_cover_all_invocations(tmp_path: Path) -> None:
    """The defect: only the last invocation counted, so a run on 2 ranks and then on 1 was one on 1 rank."""
    first, second = pairs(tmp_path, [0.1])
    attempts = [{"ranks": ranks, "git_commit": commit} for ranks, commit in ((2, "a"), (2, "b"), (1, "b"))]
    notes = compared([with_attempts(first, attempts), with_attempts(second, attempts[2:])]).notes
    assert "the ranks differ, which changes the weights by rounding only: 2 then 1 and 1" in notes
    assert "the commits differ: 'a' then 'b' and 'b'" in notes
    assert not any("devices" in note for note in notes)


def test_keys_that_say_where_the_data_are_are_not_the_subject_of_a_comparison(tmp_path: Path) -> None:
    """The defect: runs that were tested on different sets were compared, also sample by sample."""
    runs = [write_run(tmp_path / name, 1, 0.9, data={"test": name}) for name in ("a", "b")]
    for run in runs:
        write_outcomes(run.folder, Outcomes(END, np.zeros(10, np.float32), np.ones(10, np.bool_)))
    found = compared(runs)
    text = "the test sets may differ: data.test"
    assert found.confounds == (text,)
    assert sample_test(*runs) == text
    assert f"McNemar's test is not available: {text}" in found.notes
    assert found.pairs[0].samples is None


def test_another_training_set_is_named_unless_the_records_show_that_it_is_the_same(tmp_path: Path) -> None:
    def confounds(name: str, mean: Any, key: str = "train", **data: Any) -> tuple[str, ...]:
        runs = [write_run(tmp_path / name / part, 1, 0.9, data={key: part, **data}) for part in ("a", "b")]
        for run in runs:
            change_json(run.folder / "record.json", lambda record: record.update(data=mean and {"mean": mean}))
        return compared([RunFiles.read(run.folder) for run in runs]).confounds

    assert confounds("unknown", {}) == ("the training sets may differ: data.train",)
    assert confounds("same", [0.5]) == ()
    assert confounds("held-out", [0.5], test_fraction=0.1) == ("the test sets may differ: data.train",)
    assert confounds("moved", [0.5], "root") == ()
    unknown = ("the training sets may differ: data.root", "the test sets may differ: data.root")
    assert confounds("unknown-root", {}, "root") == unknown


def test_records_of_held_out_samples_show_whether_the_test_sets_are_the_same(tmp_path: Path) -> None:
    def confounds(name: str, second: dict[str, Any], **data: Any) -> tuple[str, ...]:
        first = {"mean": [0.5], "std": [1.0], "test": {"num_samples": 7, "sha256": "ab"}}
        runs = [write_run(tmp_path / name / part, 1, 0.9, data={"root": part, **data}) for part in ("a", "b")]
        for run, values in zip(runs, (first, {**first, **second}), strict=True):
            change_json(run.folder / "record.json", lambda record, values=values: record.update(data=values))  # type: ignore[misc]
        return compared([RunFiles.read(run.folder) for run in runs]).confounds

    assert confounds("same", {}, test_fraction=0.1) == ()
    other = {"test": {"num_samples": 7, "sha256": "cd"}}
    assert confounds("other", other, test_fraction=0.1) == ("the test sets differ: other samples are held out",)
    texts = confounds("values", {"mean": [0.7]}, test_fraction=0.1)
    assert texts == ("the training data differ: mean[0] 0.5 and 0.7", "the test sets may differ: data.root")


@pytest.mark.parametrize("name", ["test", "validation"])
def test_records_of_evaluation_sets_show_whether_they_are_the_same(tmp_path: Path, name: str) -> None:
    """The defect: an evaluation set in its own file had no record, so another one of the same name went unnoticed."""

    def confounds(folder: str, second: Any, *values: str) -> tuple[str, ...]:
        first = {f"the number of {name} samples": [7], f"the {name} targets": ["ab"], f"the {name} samples": ["cd"]}
        data = [{name: value} if name == "test" else {} for value in values]
        arms = zip(("grow", "decay"), data, strict=True)
        runs = [write_run(tmp_path / folder / policy, 1, 0.9, policy, data=keys) for policy, keys in arms]
        for run, found in zip(runs, (first, second if isinstance(second, list) else {**first, **second}), strict=True):
            record = {"mean": [0.5], "std": [1.0], "evaluation_sets": {name: found}}
            change_json(run.folder / "record.json", lambda tree, record=record: tree.update(data=record))  # type: ignore[misc]
        return compared([RunFiles.read(run.folder) for run in runs]).confounds

    assert confounds("same", {}, "t", "t") == confounds("moved", {}, "t", "u") == ()
    corrupted = {f"the {name} samples": ["xy"]}  # images with noise, of the same labels
    assert confounds("corrupted", corrupted, "t", "t") == (f"the {name} sets differ: the {name} samples",)
    shorter = {f"the number of {name} samples": [6], f"the {name} targets": ["a"]}
    both = (f"the {name} sets differ: the number of {name} samples, the {name} targets",)
    assert confounds("shorter", shorter, "t", "u") == both
    assert confounds("damaged", [3], "t", "u") == (("the test sets may differ: data.test",) if name == "test" else ())


def test_a_fact_of_several_pairs_is_stated_once(tmp_path: Path) -> None:
    """The defect: a reason that concerned 5 seeds took 5 lines, and a confound did not name its seeds."""
    runs = pairs(tmp_path, [0.1, 0.2, 0.3])
    found = compared(runs, metric="loss", dataset="test")
    assert [note for note in found.notes if "McNemar" in note] == [
        "McNemar's test is not available: job has no outcomes.npz"
    ]
    for run in (runs[1], runs[5]):
        change_json(run.folder / "plan.json", lambda plan: plan.update(num_validation=7))
    found = compared([RunFiles.read(run.folder) for run in runs])
    assert found.confounds == ("the validation sets differ: 0 and 7 samples (seeds 5, 7)",)
    change_json(runs[5].folder / "plan.json", lambda plan: plan.update(num_validation=0))
    found = compared([RunFiles.read(run.folder) for run in runs])
    assert found.confounds == ("the validation sets differ: 0 and 7 samples (seed 5)",)
