"""Other differences between two arms that could explain a difference of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hvd_batchgrow.data.datasets.fingerprint import data_changes
from hvd_batchgrow.messages.wording import listed, shown
from hvd_batchgrow.results.records import printable
from hvd_batchgrow.results.run_files import RunFiles

Runs = tuple[RunFiles, RunFiles]
_MOST_KEYS = 8
_SCHEDULE = ("schedule", "trigger", "gradient_noise", "optim.lr", "optim.momentum", "layout")
"""Keys in which a job and its twin differ."""
_NO_EFFECT = ("name", "seed", "logging", "checkpoint", "checks", "layout.ranks", "layout.max_micro_batch", "evaluation")
_LOCATIONS = frozenset({"data.source", "data.root", "data.train", "data.test"})
"""Keys of `[data]` that do not change how the samples are used."""


def find_confounds(pairs: Sequence[Runs], metric: str) -> tuple[str, ...]:
    """Return differences within pairs besides the schedule: keys of the job, the data, the number of samples.

    Args:
        pairs: the runs that are counted.
        metric: that is compared. Losses that are computed in another way are different quantities.
    """
    return tuple(dict.fromkeys(text for pair in pairs for text in _confounds(*pair, metric)))


def _confounds(first: RunFiles, second: RunFiles, metric: str) -> Iterator[str]:
    sizes = [int(run.plan["num_samples"]) for run in (first, second)]
    if sizes[0] != sizes[1]:
        yield f"the training sets differ: N = {sizes[0]:,} and {sizes[1]:,} samples, so the streams differ too"
    validation = [run.plan.get("num_validation", 0) for run in (first, second)]
    if validation[0] != validation[1]:
        yield f"the validation sets differ: {shown(validation[0])} and {shown(validation[1])} samples"
    trained = [run.samples for run in (first, second)]
    largest = max([1, *(phase["global_batch"] for run in (first, second) for phase in run.plan["phases"])])
    if abs(trained[0] - trained[1]) > largest:
        yield f"the runs trained on {trained[0]:,} and {trained[1]:,} samples, which differ by more than a batch"
    changed = changed_keys(first.job, second.job)
    if sizes[0] == sizes[1] and not {key for key in changed if key.startswith("data.")} - _LOCATIONS:
        yield from _other_data(first, second)
    # Label smoothing is for training only; all other keys of a task decide how the loss of an evaluation is computed.
    of_loss = [key for key in changed if key.startswith("task.") and key != "task.label_smoothing"]
    if metric in {"loss", "average_loss"} and of_loss:
        yield f"the losses are not the same quantity: the jobs differ in {listed(of_loss, _MOST_KEYS, text=printable)}"
    others = [key for key in changed if not key.startswith(_SCHEDULE)]
    if len(others) > (len(others) == len(changed)):  # a single key is the subject of the comparison
        yield f"the jobs also differ in {listed(others, _MOST_KEYS, text=printable)}"


def _other_data(first: RunFiles, second: RunFiles) -> Iterator[str]:
    """Yield a difference of training sets of the same size, if the runs recorded what shows it."""
    try:
        found = data_changes(first.data, second.data)
    except (ValueError, TypeError):  # a damaged record
        return
    if found:
        texts = [f"{what} {one} and {two}" for what, one, two in found]
        yield f"the training data differ: {listed(texts, separator='; ', text=printable)}"


def changed_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys in which two jobs differ, without those that do not affect the weights."""
    one, two = dict(leaves(first)), dict(leaves(second))
    keys = sorted({*one, *two})
    return [key for key in keys if one.get(key) != two.get(key) and not key.startswith(_NO_EFFECT)]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a job with their values."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find_notes(first: Sequence[RunFiles], second: Sequence[RunFiles], pairs: Sequence[Runs]) -> tuple[str, ...]:
    """Return notes on the runs: those that were not counted, and differences of ranks, devices and versions.

    Args:
        first: all runs of the first arm.
        second: all runs of the second arm.
        pairs: the runs that are counted.
    """
    notes = [
        f"{run.folder} is not counted: {_why_not_counted(run, others, pairs)}"
        for runs, others in ((first, second), (second, first))
        for run in runs
        if not any(run is member for pair in pairs for member in pair)
    ]
    for what, value_of in _CIRCUMSTANCES.items():
        found = {(shown(value_of(a)), shown(value_of(b))) for a, b in pairs if value_of(a) != value_of(b)}
        notes += [f"{what}: {one} and {two}" for one, two in sorted(found)]
    if any(run.job["schedule"]["policy"] == "adaptive" for pair in pairs for run in pair):
        notes.append("the schedule is adaptive: each pair has its own, decided in its run")
    return tuple(dict.fromkeys([*notes, *(fault for run in (*first, *second) for fault in run.faults)]))


def _why_not_counted(run: RunFiles, others: Sequence[RunFiles], pairs: Sequence[Runs]) -> str:
    if not run.is_finished:
        epochs = [count / int(run.plan["num_samples"]) for count in (run.samples, int(run.plan["end_samples"]))]
        return f"it has done {epochs[0]:.2f} of {epochs[1]:.2f} epochs"
    if any(first.seed == run.seed for first, _ in pairs):
        return f"another run of seed {run.seed} is counted"
    if not any(other.seed == run.seed for other in others):
        return f"the other job has no run of seed {run.seed}"
    return f"the runs of seed {run.seed} do not both have a finite result at their end"


def _last(run: RunFiles, *keys: str) -> Any:
    value: Any = run.last_attempt
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


_CIRCUMSTANCES: Mapping[str, Callable[[RunFiles], Any]] = {
    "the ranks differ, which changes the weights by rounding only": lambda run: _last(run, "ranks"),
    "the devices differ": lambda run: _last(run, "hardware", "device"),
    "the versions of torch differ": lambda run: _last(run, "packages", "torch"),
    "the versions of hvd_batchgrow differ": lambda run: _last(run, "packages", "hvd_batchgrow"),
    "the arithmetic differs": lambda run: _last(run, "arithmetic"),
    "the commits differ": lambda run: _last(run, "git_commit"),
    "the commits of the user's code differ": lambda run: _last(run, "user_git_commit"),
}
