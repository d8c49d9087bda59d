"""Check `[data]` without the data: size, kind, and keys that the source would not use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import SOURCES, Kind, SourceSpec
from hvd_batchgrow.config.split import num_validation, source_size
from hvd_batchgrow.config.task_specs import TargetKind
from hvd_batchgrow.data.augment_checks import IMAGE_KEYS, augment_faults
from hvd_batchgrow.data.datasets.constant_faults import constant_faults
from hvd_batchgrow.messages.errors import Fault, JobError

_CATEGORIES = {"categorical", "categorical_encoding", "unknown_category"}
_KEYS_OF_ALL = {"source", "num_samples", "validation_fraction", "num_classes", "class_names", "pipeline"}
"""Keys that every source uses."""

_CROP = {"image_size", "crop_scale", "crop_ratio", "eval_resize"}
_KEYS_OF_KIND: dict[Kind, set[str]] = {
    "images": {"mean", "std", "crop_padding", "hflip", "channels_last", "dtype", *IMAGE_KEYS},
    "rows": {"mean", "std"},
    "encoded": {"mean", "std", "hflip", "channels_last", "dtype", "on_bad_sample", "apply_orientation"}
    | _CROP
    | IMAGE_KEYS,
    "samples": {"workers"},
    "tokens": set(),
}
"""Keys that each kind of samples uses for preprocessing."""

_LONGEST = 10
"""Largest plausible ratio of a window's sides."""
KIND_TEXT: dict[Kind, str] = {
    "images": "images of one size",
    "rows": "rows",
    "encoded": "encoded images",
    "samples": "samples of a torch Dataset",
    "tokens": "windows of tokens",
}
_INSTEAD = {("image_size", "images"): "; use data.crop_padding", ("crop_padding", "encoded"): "; use data.image_size"}


def known_num_samples(data: DataSection) -> int:
    """Return N, the number of samples to train on, without reading the data.

    Raises:
        JobError: the size of the source is unknown, or all its samples would be held out for validation.
    """
    size = known_source_size(data)
    if faults := _validation_faults(data):
        raise JobError(faults)
    return size - num_validation(data)


def known_source_size(data: DataSection) -> int:
    """Return the number of training samples of the source, with those held out for validation.

    It is that of the job, or the known size of the source.

    Raises:
        JobError: the job does not state it, and the size of the source is unknown.
    """
    known = source_size(data)
    if known is None:
        fault = (
            f"is needed: the size of a source {data.source!r} is not known; set the number of training samples "
            "under [data]: if it is wrong, train reports the right number"
        )
        raise JobError([Fault("data.num_samples", fault)])
    return known


def check_data(data: DataSection, kind: Kind | None = None) -> list[Fault]:
    """Return all faults of `[data]` that can be found without the data.

    A key that would be ignored is a fault, unless it has its default value.

    Args:
        data: the section.
        kind: of the loaded samples; None: any that the source may have, so that some faults are not found yet.
    """
    given = {key for key, field in type(data).model_fields.items() if getattr(data, key) != field.default}
    spec = SOURCES.get(data.source)
    kinds = (kind,) if kind else spec.kinds if spec else get_args(Kind)
    faults = [
        *(_unused_by_source(spec, given) if spec else []),
        *_unused_by_kinds(kinds, data.source, given),
        *_crop_faults(data, kinds, given),
        *augment_faults(data, given),
        *_held_out_faults(data),
        *_validation_faults(data),
        *_category_faults(data, given),
        *(spec.faults(data) if spec else []),
    ]
    if "rows" not in kinds:
        faults += [Fault(f"data.{key}", fault) for key, fault in constant_faults(data.mean, data.std)]
    return sorted(faults, key=lambda fault: fault.path)


_TARGETS: dict[TargetKind, str] = {
    "class": "a class per sample",
    "values": "numbers per sample",
    "tokens": "tokens",
}


def check_targets(data: DataSection, target: TargetKind | None) -> list[Fault]:
    """Return a fault if a built-in source does not have the targets that the task needs.

    Args:
        data: the section.
        target: that the task needs; None: a custom task accepts any.
    """
    spec = SOURCES.get(data.source)
    if isinstance(data.label, tuple) and target != "values":
        fault = f"{list(data.label)}: several columns are for the tasks multi_label and regression; name one"
        return [Fault("data.label", fault)]
    if isinstance(data.label, tuple) and not data.label:
        return [Fault("data.label", "[] names no column; name at least one")]
    if spec is None or target is None or target in spec.targets:
        return []
    users = ", ".join(other.name for other in SOURCES.specs() if target in other.targets)
    fault = f"{data.source!r} has {_TARGETS[spec.target]}, and the task needs {_TARGETS[target]}"
    return [Fault("data.source", f"{fault}: sources with them are {users} and your own module:function")]


def _unused_by_source(spec: SourceSpec, given: set[str]) -> list[Fault]:
    of_kinds: set[str] = set().union(*_KEYS_OF_KIND.values())
    unused = given - spec.keys - _KEYS_OF_ALL - of_kinds
    return [Fault(f"data.{key}", f"is not used by the source {spec.name!r}, but by {_users(key)}") for key in unused]


def _users(key: str) -> str:
    return ", ".join(spec.name for spec in SOURCES.specs() if key in spec.keys)


def _unused_by_kinds(kinds: Sequence[Kind], source: str, given: set[str]) -> list[Fault]:
    """Return a fault for each key that samples of none of these kinds use."""
    unused = {
        key: [KIND_TEXT[other] for other, keys in _KEYS_OF_KIND.items() if key in keys]
        for key in given.difference(*(_KEYS_OF_KIND[kind] for kind in kinds))
    }
    own = " or ".join(KIND_TEXT[kind] for kind in kinds)
    return [
        Fault(
            f"data.{key}",
            f"is for {' and '.join(users)}, and {source!r} has {own}"
            + "".join(_INSTEAD.get((key, kind), "") for kind in kinds),
        )
        for key, users in unused.items()
        if users
    ]


def _crop_faults(data: DataSection, kinds: Sequence[Kind], given: set[str]) -> list[Fault]:
    faults = []
    if data.image_size is None and kinds == ("encoded",):
        faults.append(Fault("data.image_size", f"is needed: {data.source!r} has images of any size; 224 is usual"))
    elif data.image_size is None and "encoded" in kinds:
        lonely = given & _CROP
        faults += [Fault(f"data.{key}", "requires data.image_size, which is missing") for key in lonely]
    if data.image_size and data.eval_resize and data.eval_resize < data.image_size:
        fault = f"{data.eval_resize} is below data.image_size = {data.image_size}: the center crop would not fit"
        faults.append(Fault("data.eval_resize", f"{fault}; use >= {data.image_size}"))
    faults += [
        Fault(f"data.{key}", f"must be [min, max], got [{low:g}, {high:g}]; try [{high:g}, {low:g}]")
        for key, (low, high) in (("crop_scale", data.crop_scale), ("crop_ratio", data.crop_ratio))
        if low > high
    ]
    if max(data.crop_scale) > 1:
        fault = f"{max(data.crop_scale):g} exceeds 1, the area of the whole image; use <= 1"
        percent = f", or [{', '.join(f'{share / 100:g}' for share in data.crop_scale)}] for percent"
        faults.append(Fault("data.crop_scale", fault + (percent if max(data.crop_scale) <= 100 else "")))
    low, high = data.crop_ratio
    if low > _LONGEST or high < 1 / _LONGEST:
        fault = f"[{low:g}, {high:g}]: every window would have one side {_LONGEST} times the other or more"
        percent = f"; for percent use [{low / 100:g}, {high / 100:g}]" if low > _LONGEST else ""
        faults.append(Fault("data.crop_ratio", f"{fault}; usual are [0.75, 1.33]{percent}"))
    return faults


def _held_out_faults(data: DataSection) -> list[Fault]:
    if data.test_fraction and data.test is not None:
        return [
            Fault(
                "data.test_fraction",
                f"contradicts data.test = {data.test!r}: both define the test set; remove one",
            )
        ]
    return []


def _validation_faults(data: DataSection) -> list[Fault]:
    size, held_out = source_size(data), num_validation(data)
    if size is None or held_out < size:
        return []
    arithmetic = f"{data.validation_fraction:g} of {size:,} samples, rounded up, are {held_out:,}"
    return [Fault("data.validation_fraction", f"{arithmetic}: no sample would be left to train on")]


def _category_faults(data: DataSection, given: set[str]) -> list[Fault]:
    lonely = sorted(given & _CATEGORIES - {"categorical"}) if not data.categorical else []
    return [Fault(f"data.{key}", "requires data.categorical, which is missing") for key in lonely]
