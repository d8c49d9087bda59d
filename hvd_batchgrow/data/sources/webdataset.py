"""WebDataset: tar files in which each sample is a few members."""

from __future__ import annotations

from hvd_batchgrow.config.source_specs import FILE_KEYS, SOURCES, SourceSpec, load_of

SOURCES.register(
    SourceSpec(
        name="webdataset",
        doc="shards `*train*.tar` and `*val*.tar`; a pattern or `shard-{0000..0147}.tar`; the label in a member such "
        "as `.cls` or in a field of `.json`",
        kinds=("encoded",),
        keys=FILE_KEYS | {"label"},
        load=load_of("hvd_batchgrow.data.images.webdataset"),
    )
)
