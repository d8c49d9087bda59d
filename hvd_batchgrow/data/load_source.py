"""Load the samples of a job's `[data]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import SOURCES, ReportProgress
from hvd_batchgrow.config.task_specs import TargetKind
from hvd_batchgrow.data.augment_checks import channel_faults
from hvd_batchgrow.data.datasets.class_labels import notes_on_classes
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.subset import whole_of
from hvd_batchgrow.data.held_out import with_validation
from hvd_batchgrow.data.own_source import load_own
from hvd_batchgrow.data.source_checks import check_data, check_targets, known_source_size
from hvd_batchgrow.messages.errors import Fault, JobError, RunError

_MOST_CLASSES = 1 << 20
"""Most classes that labels may imply without `data.num_classes`: a flipped bit could imply a network of any size."""


def load_source(
    data: DataSection,
    seed: int,
    report: ReportProgress,
    target: TargetKind | None = "class",
    *,
    any_size: bool = False,
) -> Datasets:
    """Open a source; download or index it first if necessary.

    Args:
        data: the section of the job.
        seed: of the job; draws held-out rows, validation samples and synthetic samples.
        report: called with the progress of long operations.
        target: targets that the task needs; None: any.
        any_size: accept any number of training samples.

    Raises:
        JobError: the section does not fit the source.
        RunError: the source is missing, damaged, or of another size than the job states.
    """
    _raise_faults(check_data(data))
    spec = SOURCES.get(data.source)
    _raise_faults(check_targets(data, target))
    load = spec.load_values if spec and target == "values" and spec.load_values else spec and spec.load
    source: Datasets = load(data, seed, report) if load else load_own(data, seed, target)
    if not spec or len(spec.kinds) > 1:
        _raise_faults(check_data(data, source.train.kind))
    if target == "class" and data.num_classes is None and source.num_classes > _MOST_CLASSES:
        fault = f"its largest label is {source.num_classes - 1}, which is not plausible: is a file damaged?"
        raise RunError(f"{data.root or data.source}: {fault} If not, set data.num_classes = {source.num_classes}")
    found = len(source.train)
    planned = found if any_size else known_source_size(data)
    if planned != found:
        said = (
            f"data.num_samples = {planned}" if data.num_samples else f"{data.source!r} has {planned} training samples"
        )
        remedy = f"set data.num_samples = {found}"
        raise RunError("\n  ".join([f"{said}, but {found} training samples were found; {remedy}", *source.notes]))
    if data.validation_fraction and source.validation is not None:
        fault = f"{data.source!r} has its own validation set of {len(source.validation):,} samples; use 0"
        raise JobError([Fault("data.validation_fraction", fault)])
    source = _with_overrides(source, data, target)
    if data.validation_fraction:
        source = with_validation(source, data.validation_fraction, seed)
    return _with_class_notes(source) if target == "class" or (spec and target is None) else source


def _with_class_notes(source: Datasets) -> Datasets:
    """Add a note on classes that never occur in training, if all labels are in arrays: others may be too many."""
    sets = {"training": source.train, "validation": source.validation, "test": source.test}
    labels = {
        name: samples.targets[np.arange(len(samples))]
        for name, samples in sets.items()
        if samples is not None and isinstance(whole_of(samples).targets, np.ndarray)
    }
    train = labels.pop("training", None)
    if train is None or train.ndim != 1 or train.dtype.kind not in "iu":
        return source
    notes = notes_on_classes(train, labels, source.num_classes, source.schema.get("classes") or ())
    return replace(source, notes=(*source.notes, *notes))


def _with_overrides(source: Datasets, data: DataSection, target: TargetKind | None) -> Datasets:
    """Check and apply the job's number of classes, mean and std, which take precedence over the source's."""
    channels = source.train.shape[-1] if source.train.shape else 0
    faults = [
        Fault(
            f"data.{key}",
            f"has {len(values)} values, and a sample of {data.source!r} has {channels} {_last_axis(source)}",
        )
        for key, values in (("mean", data.mean), ("std", data.std))
        if values is not None and len(values) != channels
    ]
    if data.num_classes is not None and data.num_classes < source.num_classes:
        faults.append(Fault("data.num_classes", f"{data.num_classes} is below the {source.num_classes} of the source"))
    if source.train.kind == "images" and data.crop_padding >= min(source.train.shape[:2]):
        height, width, _ = source.train.shape
        fault = f"{data.crop_padding}: a crop of a {height} × {width} image could consist of padding only"
        faults.append(Fault("data.crop_padding", f"{fault}; use < {min(height, width)}"))
    if source.train.kind not in {"rows", "samples"}:
        faults += channel_faults(data, channels)
    if target == "values" and data.num_classes not in {None, source.num_classes}:
        fault = f"{data.num_classes}, and a sample has {source.num_classes} targets; remove the key"
        faults.append(Fault("data.num_classes", fault))
    if target == "class" and max(source.num_classes, data.num_classes or 0) == 1:
        fault = "1: every label is 0, so the loss is 0 and the accuracy 100 % before training"
        faults.append(Fault("data.num_classes", fault))
    num_classes = data.num_classes or source.num_classes
    if data.class_names is not None:
        faults += _name_faults(data.class_names, num_classes, source)
    _raise_faults(faults)
    return replace(
        source,
        num_classes=num_classes,
        schema={**source.schema, "classes": list(data.class_names)} if data.class_names else source.schema,
        mean=data.mean or source.mean,
        std=data.std or source.std,
    )


def _name_faults(names: Sequence[str], num_classes: int, source: Datasets) -> Iterator[Fault]:
    """Yield the faults of `data.class_names`."""
    known = source.schema.get("classes")
    if known:
        yield Fault("data.class_names", f"the source has names already: {', '.join(map(str, known[:5]))}; remove it")
    elif len(names) != num_classes or len({*names}) != len(names):
        fault = f"has {len({*names})} different names, and the data has {num_classes} classes, labels or numbers"
        yield Fault("data.class_names", fault)


def _last_axis(source: Datasets) -> str:
    return "features" if source.train.kind == "rows" else "channels"


def _raise_faults(faults: Sequence[Fault]) -> None:
    if faults:
        raise JobError(faults)
