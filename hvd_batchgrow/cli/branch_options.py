"""Options that `branch` and `submit --branch` share: which branches of a run are trained, and how they are compared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hvd_batchgrow.config.types import PositiveFloat, PositiveInt
from hvd_batchgrow.messages.errors import Fault

if TYPE_CHECKING:
    from hvd_batchgrow.train.run.branch_folders import BranchSetup


@dataclass(frozen=True, kw_only=True)
class BranchOptions:
    """Which branches of a run are trained, and how they are compared."""

    at: PositiveInt | None = None
    """Sample counter of the checkpoint to branch from. None: the newest one before the end of the run."""
    factors: str = "1,2,4,8"
    """Batches of the branches, as multiples of the run's batch at the checkpoint; 1 must be among them."""
    samples: PositiveInt | None = None
    """Samples that each branch trains on, rounded up to whole updates of all. None: half an epoch, at least 32 blocks.
    """
    lr_rule: Literal["auto", "none", "sqrt", "linear"] = "auto"
    """Factor of the learning rate for k times the batch: none: 1; sqrt: √k, for Adam with new β₁, β₂ and eps; linear:
    k. auto: sqrt for Adam, otherwise linear."""
    tolerance: PositiveFloat | None = None
    """A branch is not worse if the 95 % interval of its loss difference is below this number. None: if the interval is
    not entirely above 0."""

    def factor_faults(self) -> Iterator[Fault]:
        """Yield a fault if the factors are not a list of numbers."""
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", self.factors):
            yield Fault("--factors", f"must be whole numbers such as 1,2,4,8, got {self.factors!r}")

    def stated(self) -> dict[str, Any]:
        """Return the values of the options of this class that are not the default, by option such as --lr-rule."""
        given = ((field, getattr(self, field.name)) for field in fields(BranchOptions))
        return {f"--{field.name.replace('_', '-')}": value for field, value in given if value != field.default}

    def setup_of(self, run: Path, ranks: int) -> BranchSetup:
        """Return the branches of a run on a number of ranks, from its files. Raises JobError or RunError."""
        from hvd_batchgrow.train.run.branch_folders import set_up

        factors = [int(factor) for factor in self.factors.split(",")]
        rule = None if self.lr_rule == "auto" else self.lr_rule
        return set_up(run, self.at, factors, self.samples, rule, ranks)

    def branch_words(self, run: Path, start: int) -> list[str]:
        """Return the arguments of `branch` for these branches.

        Args:
            run: the run folder.
            start: sample counter of the checkpoint; a run that is still training saves further ones.
        """
        options = self.stated() | {"--at": start}
        return [str(run), *(word for name, value in options.items() for word in (name, str(value)))]
