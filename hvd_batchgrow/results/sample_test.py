"""Compare two networks on each sample of the test set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.results.confounds import other_test_set
from hvd_batchgrow.results.outcomes import FILE, read_outcomes
from hvd_batchgrow.results.records import base_name, printable
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
    if text := other_test_set(first, second):
        return text
    found = []
    for run in (first, second):
        try:
            found.append(_outcomes(run))
        except RunError as error:
            return str(error)
    lengths = [len(correct) for correct, _ in found]
    if lengths[0] != lengths[1]:
        return f"the test sets differ: {lengths[0]:,} and {lengths[1]:,} samples"
    (one, one_evaluated), (two, two_evaluated) = found
    both = one_evaluated & two_evaluated
    only_first, only_second = (int(np.sum(a & ~b & both)) for a, b in ((one, two), (two, one)))
    return SampleTest(int(both.sum()), only_first, only_second, mcnemar(only_first, only_second))


def _outcomes(run: RunFiles) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return of each test sample whether the network at the end is right, and whether it was evaluated.

    Raises:
        RunError: that is not on record.
    """
    found, name = read_outcomes(run.folder), printable(base_name(run.name))
    if found is None:
        raise RunError(f"{name} has no {FILE}")
    if found.samples != run.samples:
        raise RunError(f"{run.folder / FILE} is from sample {found.samples:,}, and the run ends at {run.samples:,}")
    if found.correct is None:
        raise RunError(f"{name} has no array 'correct' in {FILE}: its task does not return Losses.correct")
    return found.correct, ~np.isnan(found.losses)
