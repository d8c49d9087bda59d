"""Compare two networks on each sample of the test set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.results.outcomes import FILE, read_outcomes
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.statistics import mcnemar


@dataclass(frozen=True)
class SampleTest:
    """McNemar's test of two networks on the same test samples."""

    num_samples: int
    """Test samples that both have evaluated: without bad ones that were skipped."""
    only_first: int
    """Number of samples about which only the first network is right."""
    only_second: int
    p: float
    """Exact two-sided p-value. It concerns these two networks, not the schedules that trained them."""


def sample_test(first: RunFiles, second: RunFiles) -> SampleTest | str:
    """Return McNemar's test of the networks at the end of two runs, or why it is not available."""
    correct, evaluated = [], []
    for run in (first, second):
        try:
            found = read_outcomes(run.folder)
        except RunError as error:
            return str(error)
        if found is None:
            return f"{run.name} has no {FILE}"
        if found.samples != run.samples:
            return f"{run.folder / FILE} is from sample {found.samples:,}, and the run ends at {run.samples:,}"
        if found.correct is None:
            return f"{run.name} has no array 'correct' in {FILE}: its task does not return Losses.correct"
        correct.append(found.correct)
        evaluated.append(~np.isnan(found.losses))
    if len(correct[0]) != len(correct[1]):
        return f"the test sets differ: {len(correct[0]):,} and {len(correct[1]):,} samples"
    both = evaluated[0] & evaluated[1]
    only_first, only_second = (int(np.sum(a & ~b & both)) for a, b in (correct, correct[::-1]))
    return SampleTest(int(both.sum()), only_first, only_second, mcnemar(only_first, only_second))
