"""The checkpoint of another run that a fork continues from, as its record.json names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.wording import listed, shown
from hvd_batchgrow.results.records import printable, whole

_MOST_KEYS = 8


@dataclass(frozen=True)
class ForkedFrom:
    """A checkpoint of another run: the fork has that run's records up to it."""

    run: str
    """Path of the other run."""
    samples: int
    """Sample counter of the checkpoint."""
    changed: Mapping[str, tuple[Any, Any]] = field(compare=False)
    """Value before and after of each key that the fork has changed."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> ForkedFrom | None:
        """Return what record.json names; None: the run is not a fork."""
        tree = record.get("forked_from")
        if not isinstance(tree, dict):
            return None
        changed = tree.get("changed")
        items = changed.items() if isinstance(changed, dict) else ()
        values = {key: (value[0], value[1]) for key, value in items if isinstance(value, list) and len(value) == 2}
        return cls(str(tree.get("run")), whole(tree.get("samples"), 0, 0), values)

    @property
    def name(self) -> str:
        """Name of the other run."""
        return printable(Path(self.run).name)

    def changes(self) -> str:
        """Return the changed keys with their values before the fork: `optim.lr was 0.1`."""
        texts = [f"{key} was {shown(before)}" for key, (before, _) in self.changed.items()]
        return listed(texts, _MOST_KEYS, text=printable)
