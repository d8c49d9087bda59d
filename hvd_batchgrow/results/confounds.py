"""Other differences between two arms that could explain a difference of their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hvd_batchgrow.data.changed_data import changed_sets, data_changes
from hvd_batchgrow.messages.wording import listed, shown
from hvd_batchgrow.results.records import base_name, printable
from hvd_batchgrow.results.run_files import RunFiles

Runs = tuple[RunFiles, RunFiles]
_MOST_KEYS = 8
_SCHEDULE = ("schedule", "trigger", "gradient_noise", "optim.lr", "optim.momentum", "layout")
"""Keys in which a job and its twin differ."""
_NO_EFFECT = ("name", "seed", "logging", "checkpoint", "checks", "layout.ranks", "layout.max_micro_batch", "evaluation")
_LOCATIONS = frozenset({"data.source", "data.root", "data.train", "data.test"})
"""Keys of `[data]` that do not change how the samples are used."""


def find_confounds(pairs: Sequence[Runs], metric: str) -> tuple[str, ...]:
    """Return differences within pairs besides the schedule: keys of the job, the data, the number of samples, forks.

    Args:
        pairs: the runs that are counted.
        metric: that is compared. Losses that are computed in another way are different quantities.
    """
    return tuple(with_seeds(((text, pair[0].seed) for pair in pairs for text in _confounds(*pair, metric)), len(pairs)))


def with_seeds(found: Iterable[tuple[str, int]], num_pairs: int) -> list[str]:
    """Return each text once; with its seeds at the end unless it is that of all pairs.

    Args:
        found: texts and the seeds of the pairs that they are about.
        num_pairs: number of pairs.
    """
    seeds: dict[str, list[int]] = {}
    for text, seed in found:
        seeds.setdefault(text, []).append(seed)
    return [
        text if len(those) == num_pairs else f"{text} (seed{'s' * (len(those) > 1)} {listed(those, _MOST_KEYS)})"
        for text, those in seeds.items()
    ]


def _confounds(first: RunFiles, second: RunFiles, metric: str) -> Iterator[str]:
    yield from _forks(first, second)
    sizes = [int(run.plan["num_samples"]) for run in (first, second)]
    if sizes[0] != sizes[1]:
        yield f"the training sets differ: N = {sizes[0]:,} and {sizes[1]:,} samples, so the streams differ too"
    validation = [run.plan.get("num_validation", 0) for run in (first, second)]
    if validation[0] != validation[1]:
        yield f"the validation sets differ: {shown(validation[0])} and {shown(validation[1])} samples"
    elif found := _set_changes(*(_recorded_set(run, "validation") for run in (first, second))):
        yield f"the validation sets differ: {listed(found, text=printable)}"
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
    of_train = [key for key in changed if key in _LOCATIONS - {"data.test"}]
    if of_train and not (first.data and second.data):
        yield f"the training sets may differ: {', '.join(of_train)}"
    if text := other_test_set(first, second):
        yield text
    changed = [key for key in changed if key not in _LOCATIONS]
    others = [key for key in changed if not key.startswith(_SCHEDULE)]
    if len(others) > (len(others) == len(changed)):  # a single key is the subject of the comparison
        yield f"the jobs also differ in {listed(others, _MOST_KEYS, text=printable)}"


def _forks(first: RunFiles, second: RunFiles) -> Iterator[str]:
    """Yield that a run was trained by another job up to a checkpoint, unless both continue from the same one."""
    if first.forked_from == second.forked_from:
        return
    for run in (first, second):
        if (origin := run.forked_from) and origin.changed:
            names = [printable(base_name(name)) for name in (run.name, origin.name)]
            yield f"{names[0]} continues {names[1]} from sample {origin.samples:,}; {origin.changes()}"


def other_test_set(first: RunFiles, second: RunFiles) -> str | None:
    """Return that the test sets differ, or which changed keys may select another one; None: they are the same.

    A test set that is held out of the training files is the same if they are and the same samples are drawn; records
    name these. Of another test set they have a summary.
    """
    held_out = [run.data.get("test") for run in (first, second)]
    if None not in held_out and held_out[0] != held_out[1]:
        return "the test sets differ: other samples are held out"
    sets = [_recorded_set(run, "test") for run in (first, second)]
    if found := _set_changes(*sets):
        return f"the test sets differ: {listed(found, text=printable)}"
    is_same_data = bool(first.data and second.data) and _data_changes(first, second) == []
    if (is_same_data and None not in held_out) or (sets[0] and sets[0] == sets[1]):
        return None
    is_held_out = any(dict(leaves(run.job)).get("data.test_fraction") for run in (first, second))
    locating = _LOCATIONS if is_held_out else _LOCATIONS - {"data.train"}
    if is_same_data and not is_held_out:
        locating -= {"data.root"}  # equal training files in another folder: the same data on another machine
    keys = [key for key in changed_keys(first.job, second.job) if key in locating]
    return f"the test sets may differ: {', '.join(keys)}" if keys else None


def _recorded_set(run: RunFiles, name: str) -> dict[str, Any]:
    """Return what the record of a run says about a set that is not part of its training set; nothing if it does not."""
    sets = run.data.get("evaluation_sets")
    return {name: sets[name]} if isinstance(sets, dict) and sets.get(name) else {}


def _set_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between recorded sets; nothing if a record is damaged."""
    try:
        return changed_sets(before, now)
    except (ValueError, TypeError):
        return []


def _other_data(first: RunFiles, second: RunFiles) -> Iterator[str]:
    """Yield a difference of training sets of the same size, if the runs recorded what shows it."""
    if found := _data_changes(first, second):
        texts = [f"{what} {one} and {two}" for what, one, two in found]
        yield f"the training data differ: {listed(texts, separator='; ', text=printable)}"


def _data_changes(first: RunFiles, second: RunFiles) -> list[tuple[str, str, str]] | None:
    """Return how the recorded training sets differ; None: a record is damaged."""
    try:
        return data_changes(first.data, second.data)
    except (ValueError, TypeError):
        return None


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
    for what, keys in _CIRCUMSTANCES.items():
        values = [(_values(a, keys), _values(b, keys)) for a, b in pairs]
        found = {(_then(one), _then(two)) for one, two in values if one != two}
        notes += [f"{what}: {one} and {two}" for one, two in sorted(found)]
    if files := {file: None for pair in pairs for file in changed_code(*(run.last_attempt for run in pair))}:
        notes.append(f"the user's code differs: {listed(list(files), _MOST_KEYS, text=printable)}")
    if any(run.job["schedule"]["policy"] == "adaptive" for pair in pairs for run in pair):
        notes.append("the schedule is adaptive: each pair has its own, decided in its run")
    return tuple(dict.fromkeys([*notes, *(fault for run in (*first, *second) for fault in run.faults)]))


def changed_code(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the files of the user's code that two attempts have recorded with different contents."""
    was, found = before.get("user_code"), now.get("user_code")
    if not (isinstance(was, dict) and isinstance(found, dict)):
        return []
    return [file for file in found if file in was and was[file] != found[file]]


def _why_not_counted(run: RunFiles, others: Sequence[RunFiles], pairs: Sequence[Runs]) -> str:
    if not run.is_finished:
        epochs = [count / int(run.plan["num_samples"]) for count in (run.samples, int(run.plan["end_samples"]))]
        return f"it has done {epochs[0]:.2f} of {epochs[1]:.2f} epochs"
    if any(first.seed == run.seed for first, _ in pairs):
        return f"another run of seed {run.seed} is counted"
    if not any(other.seed == run.seed for other in others):
        return f"the other job has no run of seed {run.seed}"
    return f"the runs of seed {run.seed} do not both have a finite result and a finite loss at their end"


def _values(run: RunFiles, keys: Sequence[str]) -> list[Any]:
    """Return the different values that the invocations of a run have recorded, in their order."""
    found: list[Any] = []
    for attempt in run.attempts:
        value: Any = attempt
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and value not in found:
            found.append(value)
    return found


def _then(values: Sequence[Any]) -> str:
    return " then ".join(map(shown, values)) or "unknown"


_CIRCUMSTANCES: Mapping[str, Sequence[str]] = {
    "the ranks differ, which changes the weights by rounding only": ("ranks",),
    "the devices differ": ("hardware", "device"),
    "the versions of torch differ": ("packages", "torch"),
    "the versions of hvd_batchgrow differ": ("packages", "hvd_batchgrow"),
    "the arithmetic differs": ("arithmetic",),
    "the commits differ": ("git_commit",),
    "the commits of the user's code differ": ("user_git_commit",),
}
