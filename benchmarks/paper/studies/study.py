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
    """Arms of a study in a table of a page, compared with its first one and with their twins."""

    name: str
    study: Study
    page: str
    """Name of the page in docs/ that has the table."""
    names: tuple[str, ...] = ()
    """Names of arms, the reference first. Empty: all arms of the study."""
    dataset: str = "test"
    """The set whose accuracy is compared: `test` or `validation`."""
    margin: float | None = None
    """Largest difference that does not matter, in points; None: equivalence is not tested."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Its arms in the order of its rows. Raises KeyError if the study lacks one of them."""
        by_name = {arm.name: arm for arm in self.study.arms}
        return tuple(by_name[name] for name in self.names or by_name)


def keys(**changes: str) -> dict[str, str]:
    """Return changes of a job by key: `keys(optim__lr="0.2")` for `optim.lr`."""
    return {key.replace("__", "."): value for key, value in changes.items()}
