"""ImageNet of 2012: 1 281 167 training images of 1000 classes."""

from __future__ import annotations

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import FILE_KEYS, SOURCES, SourceSpec
from hvd_batchgrow.data.datasets.dataset import DatasetPair, ReportProgress
from hvd_batchgrow.data.sources import image_folder

_NUM_CLASSES = 1000


def load(data: DataSection, seed: int, report: ReportProgress) -> DatasetPair:
    """Load the folders like the source `image_folder`, with 1000 classes unless the job sets another number."""
    with_classes = data.model_copy(update={"num_classes": data.num_classes or _NUM_CLASSES})
    return image_folder.load(with_classes, seed, report)


SOURCES.register(
    SourceSpec(
        name="imagenet",
        doc="the folders of ImageNet, like `image_folder`; 1000 classes",
        kind="encoded",
        keys=FILE_KEYS,
        load=load,
        num_samples=lambda data: 1_281_167,
    )
)
