"""Compare runs in pairs with the same seed, and state the result in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.wording import counted, difference_scale, metric_name
from hvd_batchgrow.results.confounds import find_confounds, find_notes, with_seeds
from hvd_batchgrow.results.curves import CurveDistance, curve_distance
from hvd_batchgrow.results.records import NOT_METRICS, base_name, is_usable, number, printable, task_name
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_summary import main_metric
from hvd_batchgrow.results.sample_test import SampleTest, sample_test
from hvd_batchgrow.results.statistics import Equivalence, PairedDifference, equivalence, paired_difference
from hvd_batchgrow.storage.strict_json import dump_json

_NO_RESULT = frozenset({"name", "seed", "logging", "checkpoint", "checks"})
"""Keys of a job that two runs of one arm may differ in."""


@dataclass(frozen=True)
class Arm:
    """Runs of one job that differ only in their seeds."""

    name: str
    """Name of the job without the seed; unique among the arms of a comparison."""
    runs: tuple[RunFiles, ...]

    def by_seed(self, metric: str, dataset: str) -> Mapping[int, RunFiles]:
        """Return the run of each seed: the first with a result at its end, or else the first finished one.

        A fork is returned only if no other run has a result: its job did not train it from the start.
        """

        def order(run: RunFiles) -> tuple[bool, bool, bool]:
            return final_result(run, metric, dataset) is None, run.forked_from is not None, not run.is_finished

        found: dict[int, RunFiles] = {}
        for run in sorted(self.runs, key=order):
            found.setdefault(run.seed, run)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Pair:
    """Two finished runs with the same seed, one from each arm."""

    seed: int
    first_run: RunFiles
    second_run: RunFiles
    first: float
    """Result of the first run, in the unit of the comparison."""
    second: float
    samples: SampleTest | None
    """McNemar's test on the samples of the test set; None: not available, and the notes say why."""

    @property
    def difference(self) -> float:
        """Result of the first run minus that of the second."""
        return self.first - self.second


@dataclass(frozen=True)
class Comparison:
    """Two arms: their paired difference, and whether they are equivalent.

    All results, differences and margins are in one unit: percentage points for accuracy (`top1`), otherwise that of
    the metric.
    """

    first: Arm
    second: Arm
    metric: str
    dataset: str
    """The set on which the runs were evaluated at their end."""
    unit: str
    """`points`, or empty."""
    margin: float | None
    """The largest difference that does not matter; None: not stated."""
    pairs: tuple[Pair, ...]
    """Sorted by seed."""
    difference: PairedDifference | None
    """Of first minus second, with its 95 % interval; None without a pair."""
    equivalence: Equivalence | None
    """None without a pair or a margin."""
    curves: CurveDistance | None
    """Between the arms during training; None: they have fewer than two evaluations in common."""
    confounds: tuple[str, ...]
    """Other differences between the arms that can explain a difference of the results; one sentence each."""
    notes: tuple[str, ...]
    """Notes for the reader, such as runs that were not counted; one sentence each."""

    @property
    def more_pairs(self) -> int | None:
        """Number of additional pairs needed to show equivalence with probability 0.8 if the true difference is 0.

        None: unknown. 0: there are enough pairs, but their mean difference is too far from 0.
        """
        if self.equivalence is None or self.equivalence.pairs_needed is None:
            return None
        return max(0, self.equivalence.pairs_needed - len(self.pairs))

    def verdict(self) -> str:
        """Return what the pairs show, in one sentence."""
        text = _verdict(self)
        return f"{text} (confounded: the arms also differ in other respects)" if self.confounds else text

    def amount(self, value: float) -> str:
        """Return a difference or a margin with its unit."""
        return f"{value:.{self._digits}f}{f' {self.unit}' if self.unit else ''}"

    def result(self, value: float) -> str:
        """Return the result of a run, as in other output: `91.35 %` for accuracy."""
        return f"{value:.2f} %" if self.unit else f"{value:.4g}"

    def interval(self, low: float | None, high: float | None) -> str:
        """Return an interval with its unit."""
        if low is None or high is None:
            return "unknown"
        return f"{low:+.{self._digits}f} to {self.signed(high)}"

    def signed(self, value: float) -> str:
        """Return a difference with its sign and unit."""
        return f"{value:+.{self._digits}f}{f' {self.unit}' if self.unit else ''}"

    @property
    def limit(self) -> str:
        """The margin with its unit, as the user wrote it."""
        unit = "point" if self.unit and self.margin == 1 else self.unit
        return f"{self.margin:g} {unit}".rstrip()

    @property
    def _digits(self) -> int:
        """Decimals of differences: two for points, otherwise three digits of the largest one."""
        numbers = [abs(pair.difference) for pair in self.pairs if pair.difference]
        if self.unit or not numbers:
            return 2
        return max(0, 2 - math.floor(math.log10(max(numbers))))


def compare_runs(
    runs: Sequence[RunFiles], margin: float | None, metric: str | None = None, dataset: str = "test"
) -> list[Comparison]:
    """Compare the jobs of runs, each with the first one.

    Runs of one job, apart from its seed and name, are an arm. The twins of an adaptive job are an arm too, although
    each follows the decisions of another run.

    Args:
        runs: in any order; the first one's job comes first.
        margin: the largest difference that does not matter, above 0: in percentage points for accuracy (`top1`),
            otherwise in the unit of the metric; None: not stated.
        metric: name of the result; None: the first metric of the task, or the loss without one.
        dataset: "test" or "validation".

    Raises:
        RunError: there are fewer than two jobs, or none has the task of the first and the metric on record. If other
            jobs have, the notes name those that have not.
    """
    try:
        return _compare_all(group_runs(runs), margin, metric, dataset)
    except RecursionError:
        raise RunError("the job in a plan.json is nested too deeply to be compared") from None


def _compare_all(arms: Sequence[Arm], margin: float | None, metric: str | None, dataset: str) -> list[Comparison]:
    if len(arms) < 2:
        found = f"{counted(sum(len(arm.runs) for arm in arms), 'run')} of {counted(len(arms), 'job')}"
        raise RunError(f"a comparison needs runs of two jobs that differ in more than the seed; got {found}")
    first, *others = arms
    comparisons: list[Comparison] = []
    skipped: list[str] = []
    for other in others:
        try:
            comparisons.append(_compare(first, other, margin, metric, dataset))
        except RunError as error:
            skipped.append(str(error))
    if not comparisons:
        raise RunError("\n  ".join(dict.fromkeys(skipped)))
    notes = (f"a job is not compared: {fault}" for fault in skipped)
    return [replace(comparisons[0], notes=(*comparisons[0].notes, *notes)), *comparisons[1:]]


def group_runs(runs: Sequence[RunFiles]) -> list[Arm]:
    """Return the arms of runs, in the order of their first runs."""
    adaptive = {_place(run, run.name): run for run in runs if is_adaptive(run)}
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        is_twin = run.name.endswith("-twin")
        decided_by = adaptive.get(_place(run, run.name.removesuffix("-twin"))) if is_twin else None
        key = _job_key(run) if decided_by is None else f"twin of {_job_key(decided_by)}"
        groups.setdefault(key, []).append(run)
    arms: list[Arm] = []
    for group in groups.values():
        named_after = next((run for run in group if run.is_finished), group[0])
        name, policy = printable(base_name(named_after.name)), printable(_policy(named_after))
        taken = {arm.name for arm in arms}
        candidates = [name, f"{name} ({policy})", *(f"{name} ({k})" for k in range(2, len(arms) + 3))]
        arms.append(Arm(next(text for text in candidates if text not in taken), tuple(group)))
    return arms


def _place(run: RunFiles, name: str) -> tuple[Path, str]:
    """Return what identifies a run of a name beside another run."""
    return run.folder.resolve().parent, name


def is_adaptive(run: RunFiles) -> bool:
    """Return whether a run has an adaptive schedule."""
    return _policy(run) == "adaptive"


def _policy(run: RunFiles) -> str:
    return str(run.job["schedule"]["policy"])


def _job_key(run: RunFiles) -> str:
    return dump_json({key: value for key, value in run.job.items() if key not in _NO_RESULT}, sort_keys=True)


def _compare(first: Arm, second: Arm, margin: float | None, metric: str | None, dataset: str) -> Comparison:
    names = [task_name(arm.runs[0].job) for arm in (first, second)]
    if names[0] != names[1]:
        raise RunError(f"{first.name} has the task {names[0]!r} and {second.name} {names[1]!r}: no common result")
    metric = metric or main_metric(first.runs[0])[0]
    _check_metric((first, second), metric, dataset)
    factor, unit = difference_scale(metric)
    pairs, missing = _pairs(first, second, metric, dataset)
    differences = [pair.difference for pair in pairs]
    counted_runs = [(pair.first_run, pair.second_run) for pair in pairs]
    return Comparison(
        first,
        second,
        metric,
        dataset,
        unit,
        margin,
        tuple(pairs),
        paired_difference(differences) if pairs else None,
        equivalence(differences, margin) if pairs and margin is not None else None,
        curve_distance(counted_runs, metric, factor) if pairs else None,
        find_confounds(counted_runs, metric),
        (*find_notes(first.runs, second.runs, counted_runs), *missing),
    )


def _pairs(first: Arm, second: Arm, metric: str, dataset: str) -> tuple[list[Pair], list[str]]:
    """Return the pairs of two arms that have results, and why McNemar's test is not available for some."""
    factor, _ = difference_scale(metric)
    pairs: list[Pair] = []
    missing: list[tuple[str, int]] = []
    of_first, of_second = (arm.by_seed(metric, dataset) for arm in (first, second))
    for seed in sorted(of_first.keys() & of_second.keys()):
        runs = of_first[seed], of_second[seed]
        one, two = (final_result(run, metric, dataset) for run in runs)
        if one is None or two is None:
            continue
        if dataset != "test":
            test: SampleTest | str = "the outcomes are those of the test set"
        elif metric.startswith("average_"):
            test = "the outcomes are those of the weights, not of their average"
        else:
            test = sample_test(*runs)
        if isinstance(test, str):
            missing.append((f"McNemar's test is not available: {test}", seed))
        pairs.append(Pair(seed, *runs, factor * one, factor * two, None if isinstance(test, str) else test))
    return pairs, with_seeds(missing, len(pairs))


def final_result(run: RunFiles, metric: str, dataset: str) -> float | None:
    """Return a metric of the evaluation at the end of a finished run.

    None: it is not on record, or it or a loss of the evaluation is not finite.
    """
    lines = [line for line in run.evaluations if line.get("dataset") == dataset]
    if not run.is_finished or not lines or lines[-1]["samples"] < int(run.plan["end_samples"]):
        return None
    return number(lines[-1].get(metric)) if is_usable(lines[-1]) else None


def _check_metric(arms: Sequence[Arm], metric: str, dataset: str) -> None:
    """Raise RunError if finished runs of an arm have evaluations, but none has the metric of the set on record.

    A run with a validation set evaluates the test set at its end only.
    """
    for arm in arms:
        evaluated = [line for run in arm.runs if run.is_finished for line in run.evaluations]
        lines = [line for line in evaluated if line.get("dataset") == dataset]
        if evaluated and not lines:
            raise RunError(f"{arm.name} has no evaluation of the {dataset} set on record")
        names = sorted(
            {name for line in lines for name in line if number(line[name]) is not None} - (NOT_METRICS - {"loss"})
        )
        if lines and metric not in names:
            shown = [name if metric_name(name) == name else f"{name} ({metric_name(name)})" for name in names]
            known = f"it has {', '.join(map(printable, shown))}" if names else "it has no metric"
            raise RunError(f"{arm.name} has no {printable(metric)} of the {dataset} set on record: {known}")


def _verdict(found: Comparison) -> str:
    difference, equal = found.difference, found.equivalence
    if difference is None:
        return "not shown: no seed has a finished run of both jobs"
    if difference.low is None:
        n = len(found.pairs)
        why = (
            f"n = 1 (seed {found.pairs[0].seed}): one pair cannot separate the effect of the job from chance"
            if n == 1
            else f"all {n} pairs have the same difference, {found.signed(difference.mean)}, so its spread is unknown"
        )
        return f"not shown: {why}; train more seeds (twin --seeds {max(3, n + 1)})"
    pairs, wide = f"n = {difference.n} pairs", found.interval(difference.low, difference.high)
    what = f"{found.dataset} {metric_name(found.metric)} of {found.first.name} minus {found.second.name}"
    if equal is not None and equal.is_equivalent:
        narrow = found.interval(equal.low, equal.high)
        return f"equivalent within {found.limit}: {what} is {narrow} (90 % interval, {pairs})"
    if difference.excludes_zero:
        return f"differs: {what} is {found.signed(difference.mean)} (95 % interval {wide}, {pairs})"
    if equal is None:
        return f"not shown: {what} is {wide} (95 % interval, {pairs}), and no margin of equivalence was stated"
    narrow = found.interval(equal.low, equal.high)
    is_wide = equal.low is not None and equal.high is not None and equal.high - equal.low > 2 * equal.margin
    beyond = "is wider than" if is_wide else "reaches beyond"
    text = f"not shown: {what} is {narrow}; this 90 % interval ({pairs}) {beyond} the margin of ±{found.limit}"
    return f"{text}; if the true difference is 0, {_pairs_text(found)}"


def _pairs_text(found: Comparison) -> str:
    if found.more_pairs is None:
        return "showing equivalence needs more than a million pairs"
    if not found.more_pairs:
        return f"{counted(len(found.pairs), 'pair')} usually show equivalence"
    return f"showing equivalence needs about {counted(found.more_pairs, 'more pair')}"
