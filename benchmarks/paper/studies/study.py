"""What a study trains, and what its tables show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arm:
    """A job that is trained with several seeds."""

    name: str
    job: str
    """Its job file, relative to the root of the repository."""
    changes: Mapping[str, str] = field(default_factory=dict)
    """Keys of the job with the values that replace its own."""
    has_twin: bool = False
    """Whether its twin, which decays the learning rate where the arm grows the batch, is trained too."""
    seeds: tuple[int, ...] = ()
    """Empty: those of the study."""


@dataclass(frozen=True)
class Study:
    """Arms that are trained under the same conditions."""

    name: str
    """Name of the folder of its records in docs/results."""
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    changes: Mapping[str, str] = field(default_factory=dict)
    """Changes of every arm."""

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """Return the seeds of an arm."""
        return arm.seeds or self.seeds


@dataclass(frozen=True)
class Table:
    """Runs of a study in a table of a page: each row is compared with the first one, and with its twin."""

    name: str
    study: Study
    page: str
    """Name of the page in docs/ that has the table."""
    names: tuple[str, ...] = ()
    """Names of its rows: arms, or twins such as `grow-twin`, the reference first. Empty: all arms of the study."""
    dataset: str = "test"
    """The set on which runs are compared at their end: `test` or `validation`."""
    result: str = "accuracy"
    """What is compared: `accuracy` or `loss`."""
    margin: float | None = None
    """Largest difference that does not matter, in points; None: equivalence is not tested."""
    with_twins: bool = False
    """Whether it has columns for the twin of each row."""
    with_seconds: bool = False
    """Whether it has the median seconds of training; runs of a study share the machine with others."""
    with_figures: bool = False
    """Whether its curves are drawn."""

    @property
    def rows(self) -> Mapping[str, Arm]:
        """The arm of each row. Raises KeyError if the study lacks one of them."""
        arms = {arm.name: arm for arm in self.study.arms}
        return {name: arms[name.removesuffix("-twin")] for name in self.names or arms}


def keys(**changes: str) -> dict[str, str]:
    """Return changes of a job by key: `keys(optim__lr="0.2")` for `optim.lr`."""
    return {key.replace("__", "."): value for key, value in changes.items()}


QUIET = keys(logging__tensorboard="false")
"""What every study changes: the records are enough."""
