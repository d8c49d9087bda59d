"""Make a source of torch Datasets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.task_specs import TargetKind
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.datasets.plain_values import plain
from hvd_batchgrow.data.datasets.targets import check_digits
from hvd_batchgrow.data.held_out import with_test
from hvd_batchgrow.data.samples.keyed_samples import Drawn, KeyedSamples, Request, drawn_or_raise
from hvd_batchgrow.data.samples.reproducible import check_reproducible, ids_to_compare
from hvd_batchgrow.data.samples.sample_dataset import SampleDataset
from hvd_batchgrow.data.samples.worker_pool import WorkerPool
from hvd_batchgrow.data.tensor_tree import bit_identical, form_of
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.wording import listed, with_article

_NAMES = {1: ("train",), 2: ("train", "test"), 3: ("train", "validation", "test")}
_NUM_TARGETS = 16
"""Samples of which the digits of targets are checked."""
_MOST_NAMES = 20
"""Most classes of a set that a message lists."""
ACCEPTED = "map-style torch Datasets: one, (train, test) or (train, validation, test)"


def load_samples(returned: Any, data: DataSection, seed: int, target: TargetKind | None = "class") -> Datasets:
    """Make a source of the map-style Datasets that the user's function returned.

    A few samples of each set are drawn twice, to check that they are reproducible. A single Dataset is divided by
    `data.test_fraction`.

    Args:
        returned: an object with `__getitem__` and `__len__`, or a tuple or list of two or three.
        data: the job's section.
        seed: of the job.
        target: that the task needs; None: any.

    Raises:
        JobError: the object is something else, the task needs other targets, the number of classes is unknown, or a
            test set is missing or would be ignored.
        RunError: a sample cannot be drawn, or is not reproducible.
    """
    sets = _sets_of(returned, data)
    samples = KeyedSamples(data.source, sets, seed)
    first = _draw_one(samples, "train", 0)
    samples = replace(samples, form=form_of(first))
    num_classes, classes = _classes(sets["train"], data, first.targets, target)
    _check_same_classes(sets, data)
    for part, dataset in sets.items():
        draw, ids = partial(_draw_one, samples, part), ids_to_compare(len(dataset)).tolist()
        check_reproducible(draw, ids, bit_identical, partial(samples.locate, part))
    if target == "values" and first.targets.dtype == torch.float64:
        _check_digits(samples)
    pool = WorkerPool(samples, data.workers) if data.workers else None
    made = {part: SampleDataset(samples, part, pool, num_classes, target) for part in sets}
    source = Datasets(
        made["train"],
        made.get("test", made["train"]),
        num_classes,
        (),
        (),
        schema={"classes": list(classes)} if classes else {},
        validation=made.get("validation"),
        close=pool.close if pool else lambda: None,
    )
    return source if "test" in sets else with_test(source, data.test_fraction, seed)


def _draw_one(samples: KeyedSamples, part: str, sample_id: int) -> Drawn:
    return drawn_or_raise(samples.draw(Request(part, np.array([0]), np.array([sample_id]))))


def _check_digits(samples: KeyedSamples) -> None:
    """Raise RunError if float32 has too few digits for a few targets of the training set, from its whole length."""
    count = len(samples.sets["train"])
    ids = np.unique(np.linspace(0, count - 1, _NUM_TARGETS).astype(np.int64))
    drawn = drawn_or_raise(samples.draw(Request("train", np.zeros_like(ids), ids)))
    place = f"data.source = {samples.source!r}, {len(ids)} samples of the training set"
    check_digits(drawn.targets.reshape(len(ids), -1).numpy(), place)


def _sets_of(returned: Any, data: DataSection) -> dict[str, Any]:
    """Return the sets by name. Raises JobError."""
    is_list = isinstance(returned, list) and 2 <= len(returned) <= 3 and all(map(_may_be_dataset, returned))
    several = is_list or isinstance(returned, tuple)
    found = tuple(returned) if several else (returned,)
    if len(found) not in _NAMES:
        fault = f"{data.source} returned a tuple of {len(found)}; return {ACCEPTED}"
        raise JobError([Fault("data.source", fault)])
    if any(isinstance(dataset, ArrayDataset) for dataset in found):
        fault = f"{data.source} returned arrays without their number of classes, mean and std"
        raise JobError([Fault("data.source", f"{fault}; return Datasets(train, test, num_classes, mean, std)")])
    faults = []
    for name, dataset in zip(_NAMES[len(found)], found, strict=True):
        if (wrong := _fault(dataset)) is not None:
            faults.append(Fault("data.source", f"{data.source}: {name if several else 'the returned object'} {wrong}"))
    if not faults and len(found) == 1 and not data.test_fraction:
        fault = f"{data.source} returned one Dataset, and no test set; return (train, test), or set data.test_fraction"
        faults.append(Fault("data.source", f"{fault}, such as 0.1, which holds out a part of it"))
    if len(found) > 1:
        faults += own_test_faults(data)
    if faults:
        raise JobError(faults)
    return dict(zip(_NAMES[len(found)], found, strict=True))


def own_test_faults(data: DataSection) -> list[Fault]:
    """Return a fault if the job holds out test samples of a source that returned its own test set."""
    if not data.test_fraction:
        return []
    fault = f"{data.test_fraction:g}, but data.source = {data.source!r} returned its own test set"
    return [Fault("data.test_fraction", f"{fault}; remove the key, or return one torch Dataset, which it divides")]


def _may_be_dataset(value: Any) -> bool:
    return not isinstance(value, (tuple, list, Tensor, np.ndarray, Mapping, int, float, str, type(None)))


def _fault(dataset: Any) -> str | None:
    """Return why an object is not a map-style Dataset; None if it is."""
    if isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")):
        return (
            f"is {with_article(type(dataset).__name__)}, which can only be read in its own order. The order of the "
            "samples, resuming and the division among ranks need each sample by its number: use a Dataset with "
            "__getitem__ and __len__, or write the samples to shards for data.source = 'webdataset' or 'tfrecord'"
        )
    lacking = [name for name in ("__getitem__", "__len__") if not hasattr(dataset, name)]
    if lacking or isinstance(dataset, (Mapping, str)):
        return (
            f"is {with_article(type(dataset).__name__)}, which is not a map-style Dataset with __getitem__ and __len__"
        )
    return None if len(dataset) else "is empty"


def _classes(dataset: Any, data: DataSection, targets: Any, target: TargetKind | None) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes or of numbers, and their names if the Dataset has them. Raises JobError.

    Args:
        dataset: the training set.
        data: the job's section.
        targets: of one sample, (1, …).
        target: that the task needs; None: any.
    """
    if fault := _target_fault(targets, target):
        raise JobError([Fault("data.source", f"{data.source}: {fault}")])
    classes, count = _class_list(dataset), plain(_attribute(dataset, "num_classes"))
    known = count if isinstance(count, int) and count > 0 else len(classes)
    if target == "values":
        known = targets.shape[1] if targets.dim() > 1 else 1
        return known, classes if len(classes) == known else ()
    if data.num_classes is None and not known:
        fault = "is needed: the Dataset has neither num_classes nor classes, and its targets are not read in advance"
        remedy = "set the key, also for a custom task, or an attribute num_classes or classes of the training Dataset"
        raise JobError([Fault("data.num_classes", f"{fault}; {remedy}")])
    num_classes = max(known, data.num_classes or 0)  # a smaller number is an error of the job
    if target == "class" and targets.dim() == 2 and targets.shape[1] != num_classes:
        fault = f"{data.source}: a sample's target has {targets.shape[1]} probabilities, of {num_classes} classes"
        raise JobError([Fault("data.source", fault)])
    return num_classes, classes


def _check_same_classes(sets: Mapping[str, Any], data: DataSection) -> None:
    """Raise JobError if two sets name other classes: folders, for instance, are numbered in each set by themselves."""
    ours = _class_list(sets["train"])
    for part, dataset in sets.items():
        theirs = _class_list(dataset)
        if ours and theirs and ours != theirs:
            lists = (
                f"classes of train are {listed(ours, _MOST_NAMES)}; those of {part} are {listed(theirs, _MOST_NAMES)}"
            )
            fault = f"{data.source}: {lists}; a class must have the same number in all sets"
            raise JobError([Fault("data.source", fault)])


def _class_list(dataset: Any) -> tuple[str, ...]:
    """Return the attribute `classes` as texts; empty if it is missing."""
    names = plain(_attribute(dataset, "classes"))
    return tuple(map(str, names)) if isinstance(names, Iterable) and not isinstance(names, (str, Mapping)) else ()


def _target_fault(targets: Any, target: TargetKind | None) -> str | None:
    """Return why targets (1, …) are not those that the task needs; None if they are."""
    if target is None:
        return None
    if not isinstance(targets, Tensor):
        return f"a sample's target must be a number or a tensor, is {form_of(targets)}; use a custom task for others"
    is_right = {
        "class": targets.dim() == (2 if targets.is_floating_point() else 1),
        "values": targets.is_floating_point() and targets.dim() in {1, 2},
        "tokens": targets.dtype == torch.int64 and targets.dim() == 2,
    }
    wanted = {
        "class": "its class, an integer, or probabilities of the classes, floats (C,)",
        "values": "a float or a tensor of floats (K,)",
        "tokens": "a tensor of tokens, int64 (L,)",
    }
    return None if is_right[target] else f"a sample's target must be {wanted[target]}; it is {form_of(targets)}"


def _attribute(dataset: Any, name: str) -> Any:
    """Return an attribute of a Dataset, or of the one that it wraps, as torch's Subset does; None if it is missing."""
    while dataset is not None:
        if (found := getattr(dataset, name, None)) is not None:
            return found
        dataset = getattr(dataset, "dataset", None)
    return None
