"""Folders of images with a sub-folder for each class, and ImageNet of 2012 in such folders."""

from __future__ import annotations

from typing import Any

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import FILE_KEYS, SOURCES, ReportProgress, SourceSpec, load_of

_load = load_of("hvd_batchgrow.data.images.image_folder")


def _load_imagenet(data: DataSection, seed: int, report: ReportProgress) -> Any:
    with_classes = data.model_copy(update={"num_classes": data.num_classes or 1000})
    return _load(with_classes, seed, report)


SOURCES.register(
    SourceSpec(
        name="image_folder",
        doc="`train/CLASS/….jpg` and `val/CLASS/….jpg`; or one folder of classes, of which `test_fraction` holds out a "
        "part; also png, ppm, pgm, bmp, tif, tiff, webp ([which files](#images-files-and-folders))",
        kinds=("encoded",),
        keys=FILE_KEYS | {"test_fraction"},
        load=_load,
    )
)
SOURCES.register(
    SourceSpec(
        name="imagenet",
        doc="the folders of ImageNet, like `image_folder`; 1000 classes",
        kinds=("encoded",),
        keys=FILE_KEYS,
        load=_load_imagenet,
        num_samples=lambda data: 1_281_167,
    )
)
