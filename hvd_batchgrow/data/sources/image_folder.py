"""Folders of images with a sub-folder for each class."""

from __future__ import annotations

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import FILE_KEYS, SOURCES, SourceSpec
from hvd_batchgrow.data.datasets.dataset import DatasetPair, ReportProgress


def load(data: DataSection, seed: int, report: ReportProgress) -> DatasetPair:
    """Index the folders. Raises as `data.images.image_folder.load`."""
    from hvd_batchgrow.data.images import image_folder

    return image_folder.load(data, report)


SOURCES.register(
    SourceSpec(
        name="image_folder",
        doc="`train/CLASS/….jpg` and `val/CLASS/….jpg`; also png, ppm, pgm, bmp, tif, tiff, webp "
        "([which files](#images-files-and-folders))",
        kind="encoded",
        keys=FILE_KEYS,
        load=load,
    )
)
