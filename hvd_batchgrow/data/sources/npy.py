"""Images or rows in .npy files."""

from __future__ import annotations

from hvd_batchgrow.config.source_specs import FILE_KEYS, SOURCES, SourceSpec, load_of

SOURCES.register(
    SourceSpec(
        name="numpy",
        doc="`train_images.npy` (N, H, W[, C]) of bytes, or `train_rows.npy` (N, F) of any real numbers; "
        "`train_labels.npy`, or `train_targets.npy` (N, K) of numbers; `test_…` likewise. (N, C, H, W) is an error "
        "that shows the transposition",
        kinds=("images", "rows"),
        keys=FILE_KEYS | {"shape"},
        load=load_of("hvd_batchgrow.data.arrays.npy"),
        load_values=load_of("hvd_batchgrow.data.arrays.npy", "load_values"),
        confirming_keys=frozenset({"shape"}),
    )
)
