"""Generated images and rows."""

from __future__ import annotations

from collections.abc import Iterator

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import SOURCES, Kind, SourceSpec, load_of
from hvd_batchgrow.messages.errors import Fault

_AXES = {"synthetic_images": ("height", "width", "channels"), "synthetic_rows": ("features",)}
"""Meaning of `data.shape`, by source."""


def _faults(data: DataSection) -> Iterator[Fault]:
    axes = _AXES[data.source]
    if data.num_samples is None:
        yield Fault("data.num_samples", f"is needed: {data.source!r} generates this number of samples")
    if data.shape is not None and len(data.shape) != len(axes):
        yield Fault("data.shape", f"must be [{', '.join(axes)}] for {data.source!r}, got {list(data.shape)}")


def _register(name: str, kind: Kind) -> None:
    SOURCES.register(
        SourceSpec(
            name=name,
            doc=f"generated {kind}: any `num_samples` of any `shape`, without memory",
            kinds=(kind,),
            keys=frozenset({"shape", "test_fraction"}),
            load=load_of("hvd_batchgrow.data.arrays.synthetic"),
            faults=_faults,
        )
    )


_register("synthetic_images", "images")
_register("synthetic_rows", "rows")
