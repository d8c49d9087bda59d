"""What the program knows of a source before it reads any data: one spec per source, from its file in `data/sources`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hvd_batchgrow.config.own_code import checked_name
from hvd_batchgrow.config.registry import Registry
from hvd_batchgrow.config.task_specs import TargetKind
from hvd_batchgrow.messages.errors import Fault

if TYPE_CHECKING:  # it imports this file
    from hvd_batchgrow.config import DataSection

Kind = Literal["images", "rows", "encoded", "samples", "tokens"]
"""Samples: images of one size, rows of numbers, encoded images of any size, samples of a torch Dataset, or windows of
tokens."""


class ReportProgress(Protocol):
    """Called with the progress of long operations."""

    def __call__(self, what: str, done: int, total: int, unit: str = "bytes", /) -> None:
        """Report that `done` of `total` units are done; `unit` is a plural noun."""


Loader = Callable[["DataSection", int, ReportProgress], Any]
"""Returns a `Datasets` for the section, the job's seed, and a function for progress reports."""
FILE_KEYS = frozenset({"root", "train", "test"})


@dataclass(frozen=True)
class SourceSpec:
    """A kind of source."""

    name: str
    """Value of `data.source`."""
    doc: str
    """Its line in the table of docs/data.md: what it reads below `data.root`."""
    kinds: tuple[Kind, ...]
    """Kinds that its samples may have. If there are several, the files decide."""
    keys: frozenset[str]
    """Keys of `[data]` that it uses to find its samples, besides those that all sources use."""
    load: Loader
    num_samples: Callable[[DataSection], int | None] = lambda data: None
    """Returns N if it is known without reading the data; None: the samples are counted if the job does not state N."""
    load_values: Loader | None = None
    """Like `load`, with K numbers per sample as targets instead of classes; None: the source has only `target`."""
    target: TargetKind = "class"
    """Targets of `load`."""
    faults: Callable[[DataSection], Iterable[Fault]] = lambda data: ()
    """Returns the faults of a section that only this source has."""
    confirming_keys: frozenset[str] = frozenset()
    """Keys that confirm what the files hold, and do not change the samples."""

    @property
    def targets(self) -> tuple[TargetKind, ...]:
        """Targets that it can provide, the default first."""
        return (self.target, "values") if self.load_values else (self.target,)


def load_of(module: str, function: str = "load") -> Loader:
    """Return a loader that imports a module when it is called, and calls a function of it: `plan` imports no loader."""

    def load(data: DataSection, seed: int, report: ReportProgress) -> Any:
        return getattr(importlib.import_module(module), function)(data, seed, report)

    return load


SOURCES = Registry[SourceSpec]("hvd_batchgrow.data.sources")


def check_source(name: str) -> str:
    """Return the name. Raises ValueError if it is neither a source nor `module:function`; the message suggests one."""
    return checked_name(name, SOURCES.names(), "module:function")
