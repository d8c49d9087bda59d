"""TFRecord files of tf.train.Example."""

from __future__ import annotations

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import FILE_KEYS, SOURCES, SourceSpec
from hvd_batchgrow.data.datasets.dataset import DatasetPair, ReportProgress


def load(data: DataSection, seed: int, report: ReportProgress) -> DatasetPair:
    """Index the shards. Raises as `data.images.tfrecord.load`."""
    from hvd_batchgrow.data.images import tfrecord

    return tfrecord.load(data, report)


SOURCES.register(
    SourceSpec(
        name="tfrecord",
        doc="shards `train*` and `validation*` of tf.train.Example with `image/encoded` and `image/class/label`",
        kind="encoded",
        keys=FILE_KEYS | {"label"},
        load=load,
    )
)
