"""Files in the format of MNIST."""

from __future__ import annotations

from hvd_batchgrow.config.source_specs import SOURCES, SourceSpec, load_of

SOURCES.register(
    SourceSpec(
        name="idx",
        doc="four files in MNIST's format with MNIST's names, gzipped or not",
        kinds=("images",),
        keys=frozenset({"root", "shape"}),
        load=load_of("hvd_batchgrow.data.arrays.idx"),
        confirming_keys=frozenset({"shape"}),
    )
)
