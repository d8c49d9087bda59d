"""TFRecord files of tf.train.Example."""

from __future__ import annotations

from hvd_batchgrow.config.source_specs import FILE_KEYS, SOURCES, SourceSpec, load_of

SOURCES.register(
    SourceSpec(
        name="tfrecord",
        doc="shards `train*` and `validation*` of tf.train.Example with `image/encoded` and `image/class/label`",
        kinds=("encoded",),
        keys=FILE_KEYS | {"label"},
        load=load_of("hvd_batchgrow.data.images.tfrecord"),
    )
)
