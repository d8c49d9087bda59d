"""Tables in csv and parquet files."""

from __future__ import annotations

from hvd_batchgrow.config.source_specs import FILE_KEYS, SOURCES, SourceSpec, load_of

_KEYS = FILE_KEYS | {
    *("test_fraction", "label", "text_labels", "ignore_columns", "missing"),
    *("categorical", "categorical_encoding", "unknown_category"),
}
SOURCES.register(
    SourceSpec(
        name="csv",
        doc="`train.csv` and `test.csv`, or a fraction `test_fraction` of the rows for testing; numbers, categories "
        "and a label column (default: the last); see [tables](#tables)",
        kinds=("rows",),
        keys=_KEYS | {"header", "separator", "decimal", "missing_values"},
        load=load_of("hvd_batchgrow.data.tables.table_files"),
        load_values=load_of("hvd_batchgrow.data.tables.table_files", "load_values"),
    )
)
SOURCES.register(
    SourceSpec(
        name="parquet",
        doc="`train.parquet` and `test.parquet`, otherwise like `csv`",
        kinds=("rows",),
        keys=_KEYS,
        load=load_of("hvd_batchgrow.data.tables.table_files"),
        load_values=load_of("hvd_batchgrow.data.tables.table_files", "load_values"),
    )
)
