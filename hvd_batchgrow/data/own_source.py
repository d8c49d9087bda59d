"""User-defined sources: a function that takes `[data]` and returns a `Datasets` or torch Datasets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.task_specs import TargetKind
from hvd_batchgrow.data.datasets.checked_targets import with_checked_targets
from hvd_batchgrow.data.datasets.constant_faults import constant_faults
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Dataset, Datasets
from hvd_batchgrow.data.datasets.normalization import chunks_of, finite_chunks
from hvd_batchgrow.data.datasets.plain_values import plain
from hvd_batchgrow.data.datasets.plausibility import byte_hint, check_layout, refuse_bits
from hvd_batchgrow.data.datasets.targets import check_digits, check_target_values, target_faults
from hvd_batchgrow.data.order.keyed_generators import restored_generators, sample_words, seed_global_generators
from hvd_batchgrow.data.samples.collate import masked_fault
from hvd_batchgrow.data.samples.keyed_fetch import check_same_again, with_keyed_fetch
from hvd_batchgrow.data.samples.load_samples import ACCEPTED, load_samples, own_test_faults
from hvd_batchgrow.import_string import NotFound, find_callable
from hvd_batchgrow.messages.errors import Fault, JobError, RunError, describe_error
from hvd_batchgrow.messages.wording import counted, with_article


def load_own(data: DataSection, seed: int = 0, target: TargetKind | None = "class") -> Datasets:
    """Call `module:function` with the section; modules are also searched in the working directory.

    Args:
        data: the section.
        seed: of the job, which keys the random numbers of torch Datasets and of `fetch`.
        target: that the task needs; None: any.

    Raises:
        JobError: it cannot be imported, or returns neither a valid `Datasets` nor map-style torch Datasets, or a
            test set though the job holds one out.
        RunError: it raised an exception, or its samples are not reproducible.
    """
    try:
        function = find_callable(data.source)
    except NotFound as error:
        raise JobError([Fault("data.source", str(error))]) from error
    try:
        if not _accepts_section(function):
            example = f"def {data.source.partition(':')[2]}(data): …"
            raise JobError([Fault("data.source", f"{data.source} receives the [data] section: define it as {example}")])
        with restored_generators():
            seed_global_generators(_words(seed))  # so that random_split gives every rank the same sets
            source = function(data)
        if _has_datasets(source):
            return load_samples(source, data, seed, target)
        faults = _array_faults(source)
        if not faults:
            source = _with_plain_constants(source)
            faults = check_own(_with_keyed_fetch(source, seed), data.shape, target)
    except (JobError, RunError):
        raise
    except (Exception, SystemExit) as error:  # the user's own code
        raise RunError(f"data.source = {data.source!r} failed: {describe_error(error)}") from error
    if found := [Fault("data.source", f"{data.source}: {fault}") for fault in faults] or own_test_faults(data):
        raise JobError(found)
    checked: Datasets = _with_keyed_fetch(_with_checked_targets(source, target), seed)
    for part, samples in _sets(checked):
        check_same_again(samples, f"data.source = {data.source!r}, {part}")
    return checked


def _words(seed: int) -> list[int]:
    """Return 4 words of 32 bits that depend on the seed alone."""
    first = np.zeros(1, dtype=np.int64)
    words: list[int] = sample_words(seed, first, first)[0].tolist()
    return words


def _accepts_section(function: Callable[..., Any]) -> bool:
    """Return whether a function can be called with one argument; true if its signature is unknown."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # some compiled callables have no signature
        pass
    return True


def _array_faults(source: Any) -> list[str]:
    """Return why the members of `ArrayDataset`s are not arrays of numbers, without a mask and of the same length.

    Raises:
        RunError: rows in memory, which `fetch` returns as they are, have values that are not finite.
    """
    if not isinstance(source, Datasets):
        return []
    faults = []
    for part, samples in _sets(source):
        if not isinstance(samples, ArrayDataset):
            continue
        members = {"values": samples.values, "targets": samples.targets}
        wrong = [name for name, member in members.items() if not isinstance(member, np.ndarray)]
        for name in wrong:
            fault = f"{name} must be an array, are {with_article(type(members[name]).__name__)}"
            faults.append(f"{part}: {fault}: numpy.asarray({name})")
        faults += [f"{part}: {name} {fault}" for name, member in members.items() if (fault := masked_fault(member))]
        if not wrong and samples.values.dtype.kind not in "biuf":
            fault = f"values must be real numbers, are {samples.values.dtype}"
            remedy = ": numpy.concatenate([values.real, values.imag], axis=-1)"
            faults.append(f"{part}: {fault}{remedy if samples.values.dtype.kind == 'c' else ''}")
        if not wrong and len(samples.values) != len(samples.targets) and type(samples).__len__ is ArrayDataset.__len__:
            faults.append(f"{part}: {len(samples.values):,} values and {len(samples.targets):,} targets")
    if not faults:
        for part, samples in _sets(source):
            _check_finite(samples, f"data.source, {part}")
    return faults


def _check_finite(samples: Dataset, place: str) -> None:
    """Raise RunError if rows in memory are not finite. A file that is mapped would have to be read as a whole."""
    if not _is_stored(samples):
        return
    values = samples.values
    if values.ndim == 2 and values.dtype.kind == "f" and values.size and not isinstance(values, np.memmap):
        for _ in finite_chunks(chunks_of(values, "", lambda *_: None), place):
            pass


def _is_stored(samples: Dataset) -> TypeGuard[ArrayDataset]:
    """Return whether `fetch` returns the values of an array as they are."""
    return isinstance(samples, ArrayDataset) and type(samples).fetch is ArrayDataset.fetch


def _has_datasets(returned: Any) -> bool:
    """Return whether an object is, or was probably meant to be, one or several torch Datasets."""
    of_torch = isinstance(returned, (TorchDataset, tuple, list)) or hasattr(returned, "__getitem__")
    return of_torch and not isinstance(returned, Datasets)


def _with_checked_targets(source: Datasets, target: TargetKind | None) -> Datasets:
    """Return a source whose computed classes or tokens are checked when they are read."""
    checked: dict[str, Any] = {
        part: with_checked_targets(samples, source.num_classes, target) for part, samples in _sets(source)
    }
    return replace(source, **checked)


def _with_keyed_fetch(source: Any, seed: int) -> Any:
    """Return a source whose `fetch` receives epochs and generators if it accepts them; any other object unchanged."""
    if not isinstance(source, Datasets):
        return source
    keyed: dict[str, Any] = {part: with_keyed_fetch(samples, seed) for part, samples in _sets(source)}
    return replace(source, **keyed)


def _with_plain_constants(source: Any) -> Any:
    """Return a source whose constants and schema are values of Python, for JSON; any other object unchanged."""
    if not isinstance(source, Datasets):
        return source
    mean, std = (tuple(plain(getattr(source, key))) for key in ("mean", "std"))
    return replace(source, num_classes=plain(source.num_classes), mean=mean, std=std, schema=plain(source.schema))


def _sets(source: Datasets) -> list[tuple[str, Dataset]]:
    sets = ("train", source.train), ("validation", source.validation), ("test", source.test)
    return [(part, samples) for part, samples in sets if samples is not None]


def check_own(source: Any, shape: tuple[int, ...] | None = None, target: TargetKind | None = "class") -> list[str]:
    """Return why an object is not a valid `Datasets`, member by member; only the first sample is fetched.

    Args:
        source: returned by the user's function.
        shape: `data.shape`, which confirms an unusual shape of images.
        target: that the task needs; None: any.

    Raises:
        RunError: a target is out of range, the shape of images is implausible for (H, W, C), or all pixels of a set are
            0 or 1.
    """
    if not isinstance(source, Datasets):
        accepted = f"must return a {Datasets.__module__}.Datasets"
        return [f"{accepted}, returned {type(source).__name__}; or {ACCEPTED}"]
    sets = _sets(source)
    members = ("kind", "shape", "targets", "sizes", "fetch", "locate", "__len__")
    lacking = [f"{part} lacks {member}" for part, samples in sets for member in members if not hasattr(samples, member)]
    if lacking:
        return lacking
    faults = [f"{part}: {fault}" for part, samples in sets for fault in _sample_faults(samples, target)]
    for part, samples in sets[1:]:
        if (source.train.kind, source.train.shape) != (samples.kind, samples.shape):
            kinds = f"{source.train.kind} {source.train.shape} and {samples.kind} {samples.shape}"
            faults.append(f"train and {part} must have the same kind and shape, and are {kinds}")
    if not faults and source.train.kind == "images":  # the user's code may use data.shape for other purposes
        check_layout(source.train.shape, shape if shape == source.train.shape else None, "data.source, train")
    faults += _constant_faults(source)
    if not faults:
        for part, samples in sets:
            if samples.kind == "images" and _is_stored(samples):
                refuse_bits(samples.values, f"data.source, {part}")
            check_target_values(samples, source.num_classes, target, f"data.source, {part}")
        if target == "values" and isinstance(source.train.targets, np.ndarray):
            check_digits(source.train.targets, "data.source, train")
    return faults


def _sample_faults(samples: Dataset, target: TargetKind | None) -> list[str]:
    axes = {"images": 3, "rows": 1, "encoded": 3, "tokens": 1}
    if samples.kind not in axes:
        return [f"kind must be one of {', '.join(axes)}, is {samples.kind!r}"]
    if len(samples.shape) != axes[samples.kind]:
        hint = "; give gray images a channel: images[..., None]" if len(samples.shape) == 2 else ""
        return [f"shape of {samples.kind} must have {counted(axes[samples.kind], 'number')}, is {samples.shape}{hint}"]
    if not len(samples):
        return ["is empty"]
    faults = []
    sizes = (len(samples) if samples.kind == "encoded" else 0, 2)
    if samples.sizes.shape != sizes:
        faults.append(f"sizes of {len(samples)} {samples.kind} must be {sizes}, are {samples.sizes.shape}")
    return [*faults, *target_faults(samples, target), *_fetch_faults(samples)]


def _fetch_faults(samples: Dataset) -> list[str]:
    found = samples.fetch(np.arange(1))
    if samples.kind == "encoded":
        right = len(found) == 1 and getattr(found[0], "dtype", None) == np.uint8 and found[0].ndim == 1
        return [] if right else ["fetch must return an array of bytes (uint8) for each encoded image"]
    wanted = {"images": ("uint8",), "tokens": ("int64",)}.get(samples.kind, ("float32", "float64"))
    if str(getattr(found, "dtype", None)) not in wanted or found.shape != (1, *samples.shape):
        state = f"{getattr(found, 'dtype', type(found).__name__)} {getattr(found, 'shape', '')}"
        is_bytes = str(getattr(found, "dtype", "uint8")) == "uint8"
        hint = byte_hint(found) if samples.kind == "images" and not is_bytes else ""
        return [f"fetch of one sample must return {' or '.join(wanted)} {(1, *samples.shape)}, returned {state}{hint}"]
    return []


def _num_constants(samples: Dataset) -> int:
    """Return the number of channels or features; tokens are not normalized."""
    return samples.shape[-1] if samples.shape and samples.kind != "tokens" else 0


def _constant_faults(source: Datasets) -> list[str]:
    faults = []
    if not isinstance(source.num_classes, int) or source.num_classes < 1:
        faults.append(f"num_classes must be a whole number >= 1, is {source.num_classes!r}")
    for key in ("mean", "std"):
        values, length = getattr(source, key), _num_constants(source.train)
        if len(values) != length or not np.isfinite(values).all():
            faults.append(f"{key} must be {length} finite numbers, is {values}")
    if min(source.std, default=1) <= 0:
        faults.append(f"std must be above 0, is {source.std}")
    if not faults and source.train.kind != "rows":
        faults += [f"{key}: {fault}" for key, fault in constant_faults(source.mean, source.std)]
    return faults
