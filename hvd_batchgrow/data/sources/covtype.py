"""The forest cover types: 581 012 rows of 54 features, of 7 classes."""

from __future__ import annotations

from collections.abc import Iterator

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import SOURCES, SourceSpec, load_of
from hvd_batchgrow.config.split import num_held_out
from hvd_batchgrow.messages.errors import Fault

_NUM_ROWS = 581_012


def _faults(data: DataSection) -> Iterator[Fault]:
    if not data.test_fraction:
        fault = "is needed: 'covtype' has no separate test set; 0.2 keeps a fifth for testing"
        yield Fault("data.test_fraction", fault)


SOURCES.register(
    SourceSpec(
        name="covtype",
        doc="forest cover type: your `covtype.data[.gz]`, otherwise downloaded by scikit-learn; needs `test_fraction`",
        kinds=("rows",),
        keys=frozenset({"root", "test_fraction"}),
        load=load_of("hvd_batchgrow.data.tables.covtype"),
        num_samples=lambda data: _NUM_ROWS - num_held_out(_NUM_ROWS, data.test_fraction),
        faults=_faults,
    )
)
