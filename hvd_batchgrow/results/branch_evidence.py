"""Find the finished branches of a run, and compare those of each checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.results.branching import Branching, compare_branches, read_branch
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.schedule.branches import parse_branches_folder


@dataclass(frozen=True)
class CheckpointBranches:
    """The finished branches of a checkpoint that train on the same samples."""

    samples: int
    """Sample counter of the checkpoint."""
    num_samples: int
    """Δ: samples of each branch."""
    lr_rule: str
    folders: tuple[tuple[int, Path], ...]
    """k and run folder of each branch, by ascending k; the first is 1."""

    def compare(self, tolerance: float | None) -> Branching:
        """Compare the branches. Raises RunError if a record is missing or damaged."""
        records = [read_branch(folder, factor, self.samples) for factor, folder in self.folders]
        block = math.lcm(*(factor for factor, _ in self.folders)) * records[0].global_batch
        return compare_branches(records, block, tolerance)


def find_branches(run: Path) -> list[CheckpointBranches]:
    """Return the comparisons that a run's branches allow, by checkpoint, learning-rate rule and samples.

    Branches that are not finished are skipped, and so are checkpoints without k = 1 and another branch.
    """
    return sorted(_find(run), key=lambda one: (one.samples, one.lr_rule, one.num_samples))


def _find(run: Path) -> Iterator[CheckpointBranches]:
    for parent in (run / "branches").glob("at-*"):
        name = parse_branches_folder(parent.name)
        named = {path: re.fullmatch(r"k(\d{1,9})", path.name) for path in parent.iterdir()} if name else {}
        folders = sorted((int(found[1]), path) for path, found in named.items() if found and _is_finished(path))
        if name and len(folders) > 1 and folders[0][0] == 1:
            yield CheckpointBranches(*name, tuple(folders))


def _is_finished(folder: Path) -> bool:
    try:
        return RunFiles.read(folder).is_finished
    except RunError:
        return False
