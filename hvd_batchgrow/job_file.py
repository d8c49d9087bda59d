"""Read a job file: TOML, overrides from the command line, and all faults at once, each with its key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from hvd_batchgrow.config import DataSection, Job, ModelSection
from hvd_batchgrow.config.layout import LayoutSection
from hvd_batchgrow.config.optim import GroupSection
from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.types import Section
from hvd_batchgrow.data.source_checks import check_data, check_targets, known_num_samples
from hvd_batchgrow.messages.errors import MOST_REPORTED, Fault, JobError
from hvd_batchgrow.messages.value_faults import choice_fault, value_fault
from hvd_batchgrow.messages.wording import dotted, shown
from hvd_batchgrow.nn.checks.model_keys import check_classifier, check_network, check_reads
from hvd_batchgrow.schedule.job_model import job_model
from hvd_batchgrow.schedule.validation.key_checks import impossible_faults, key_faults
from hvd_batchgrow.storage.toml_file import read_toml, read_value, tamed, value_text
from hvd_batchgrow.tasks.task_keys import check_task_keys, check_weights

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

OTHER_NAMES = {
    "batch": "schedule.global_batch",
    "batch_size": "schedule.global_batch",
    "train_batch_size": "schedule.global_batch",
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "wd": "optim.weight_decay",
    "num_epochs": "schedule.epochs",
    "max_epochs": "schedule.epochs",
    "num_train_epochs": "schedule.epochs",
    "num_workers": "data.workers",
}
"""Keys of a job file by their names in other trainers."""


def load_job(path: Path, overrides: Mapping[str, Any] | None = None) -> Job:
    """Read a job file.

    Args:
        path: a TOML file.
        overrides: dotted key to value; they replace the file's values. An override of `layout.grow_by` also drops
            the file's keys that only another value of it uses.

    Raises:
        JobError: the file is missing, is not TOML, or has faults; the message has all of them.
    """
    tree = read_toml(path)
    overrides = overrides or {}
    faults = [fault for key, value in overrides.items() for fault in _put(tree, key, value)]
    if faults:
        raise JobError(faults, str(path))
    _drop_unused(tree, overrides)
    return parse_job(tree, str(path))


def parse_job(tree: Mapping[str, Any], source: str = "job") -> Job:
    """Return the job of a tree of plain values. Raises JobError with all faults."""
    tree, faults = tamed(tree)
    try:
        job = job_model().model_validate(tree)
    except ValidationError as error:
        faults += [*_key_faults(error), *_section_faults(tree)]
        faults += _faults_of_the_rest(tree, faults)
        raise JobError(_in_file_order(faults), source) from None
    faults += [*check_data(job.data), *check_targets(job.data, job.task.target)]
    faults += [*check_network(job.model), *check_reads(job), *check_classifier(job), *check_task_keys(job.task)]
    faults += check_weights(job.task, job.data.num_classes)
    if faults:
        raise JobError(_in_file_order(faults), source)
    return job


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split the overrides, `--optim.lr 0.2` or `--optim.lr=0.2`, from a command line: options with a dot in their name.

    Returns:
        the other arguments; dotted key to value, read by `read_value`.

    Raises:
        JobError: some keys have no value.
    """
    others: list[str] = []
    overrides: dict[str, Any] = {}
    faults: list[Fault] = []
    words = iter(arguments)
    for word in words:
        key, equals, text = word.partition("=")
        if not key.startswith("--") or "." not in key:
            others.append(word)
            continue
        value = text if equals else next(words, None)
        if value is None or (value.startswith("--") and not equals):
            faults.append(Fault(key[2:], f"has no value on the command line; write {key}=VALUE"))
        else:
            overrides[key[2:].replace("-", "_")] = read_value(value)
    if faults:
        raise JobError(faults, "command line")
    return others, overrides


def override_words(overrides: Mapping[str, Any]) -> list[str]:
    """Return the arguments from which `split_overrides` reads the same overrides."""
    return [f"--{key}={value_text(value)}" for key, value in overrides.items()]


def _put(tree: dict[str, Any], key: str, value: Any) -> Iterator[Fault]:
    """Put a value into a tree at its dotted key, or yield why it does not fit there."""
    *sections, name = key.split(".")
    if not all([*sections, name]):
        yield Fault(shown(key), "is not a key of a job file: write --SECTION.KEY VALUE, such as --optim.lr 0.2")
        return
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            yield Fault(key, f"{section} is a value, not a section")
            return
    tree[name] = value


def _drop_unused(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Drop the file's keys that an overriding `grow_by` does not use: a command line cannot remove a key."""
    if not {"layout.grow_by", "layout.ranks_per_phase"} & overrides.keys():
        return
    with suppress(ValidationError):  # reported later
        for key in LayoutSection.model_validate(tree["layout"]).unused():
            if f"layout.{key}" not in overrides:
                del tree["layout"][key]


# --- faults, from pydantic's errors --------------------------------------------------------------


@cache
def variants(section: str) -> dict[str, type[Section]]:
    """Return the models of a section, such as those of the optimizers by name; a section with one model has no name."""
    field = job_model().model_fields[section]
    if field.discriminator is None:
        return {"": field.annotation} if hasattr(field.annotation, "model_fields") else {}  # type: ignore[dict-item]
    models = get_args(field.annotation)
    return {name: model for model in models for name in get_args(model.model_fields[field.discriminator].annotation)}


@cache
def job_keys() -> tuple[str, ...]:
    """Return all keys of a job file's sections, such as `optim.lr`."""
    models = ((section, model) for section in Job.model_fields for model in variants(section).values())
    return tuple(dict.fromkeys(f"{section}.{key}" for section, model in models for key in model.model_fields))


def _in_file_order(faults: Sequence[Fault]) -> list[Fault]:
    """Return one fault for each key, in the order of the sections."""
    order = {name: index for index, name in enumerate(Job.model_fields)}
    first: dict[str, Fault] = {}
    for fault in faults:
        first.setdefault(fault.path, fault)
    return sorted(first.values(), key=lambda fault: order.get(fault.path.partition(".")[0], -1))


def _key_faults(error: ValidationError) -> list[Fault]:
    at: dict[tuple[Any, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        at.setdefault(_place(detail["loc"]), []).append(detail)
    # For a union of types pydantic reports each type: only the innermost places are kept.
    around = {place[:k] for place in at for k in range(len(place))}
    innermost = [(place, details) for place, details in at.items() if place not in around]
    faults = [_fault(place, details) for place, details in innermost[:MOST_REPORTED]]
    # Suggestions take time, so faults that are only counted get none.
    return [*faults, *(Fault(dotted(place), "") for place, _ in innermost[MOST_REPORTED:])]


def _place(location: Sequence[Any]) -> tuple[Any, ...]:
    """Return the path of a key in the file; pydantic's location also holds the variants of sections and types."""
    section, *keys = location
    if len(variants(section) if section in Job.model_fields else ()) > 1:
        keys = keys[1:]
    if (section, *keys[:1]) in _TABLES:
        return (section, *keys)
    return (section, *keys[:1], *(index for index in keys[1:] if isinstance(index, int)))


_TABLES = {("optim", "groups"): GroupSection}
"""Keys whose value is a list of tables, and the model of a table."""


def _fault(place: Sequence[Any], alternatives: Sequence[ErrorDetails]) -> Fault:
    detail = alternatives[0]
    if detail["type"] == "extra_forbidden":
        return Fault(dotted(place), f"unknown key{_suggestion(place, detail['loc'])}")
    if detail["type"] not in {"union_tag_not_found", "union_tag_invalid"}:
        return Fault(dotted(place), value_fault(alternatives))
    names, key = list(variants(place[0])), detail["ctx"]["discriminator"].strip("'")
    if "tag" in detail["ctx"]:
        return Fault(dotted([*place, key]), choice_fault(names, detail["input"].get(key)))
    return Fault(dotted([*place, key]), f"is required: one of {', '.join(names)}")


def _suggestion(place: Sequence[Any], location: Sequence[Any]) -> str:
    """Suggest a key for one that its section does not have."""
    if table := _TABLES.get(tuple(place[:2])):
        near = difflib.get_close_matches(place[-1], table.model_fields, n=1, cutoff=0.5)
        return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(table.model_fields)}"
    models = variants(place[0]) if len(place) > 1 else {"": Job}
    others = [name for name, model in models.items() if place[-1] in model.model_fields]
    if others:
        return f" of {location[1]!r}; it belongs to {', '.join(others)}"
    known = list(models[location[1] if len(models) > 1 else ""].model_fields)
    meant = [OTHER_NAMES[place[-1]]] if place[-1] in OTHER_NAMES else []
    if meant and meant[0].rpartition(".")[0] == dotted(place[:-1]):
        return f"; did you mean {meant[0]}?"
    near = [dotted([*place[:-1], key]) for key in difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)]
    same = [key for key in job_keys() if key.endswith(f".{place[-1]}")]
    if near := near or [*meant, *same]:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known here: {', '.join(known)}"


# --- faults that others would hide ---------------------------------------------------------------


def _section_faults(tree: Mapping[str, Any]) -> list[Fault]:
    """Return the faults between the keys of sections whose keys are valid one by one."""
    faults = []
    with suppress(ValidationError):
        faults += check_data(DataSection.model_validate(tree.get("data")))
    with suppress(ValidationError):
        faults += check_task_keys(TaskSection.model_validate(tree.get("task", {})))
    with suppress(ValidationError):
        faults += check_network(ModelSection.model_validate(tree.get("model")))
    return faults


def _faults_of_the_rest(tree: Mapping[str, Any], faults: Sequence[Fault]) -> list[Fault]:
    """Return what a plan would refuse in the valid keys, unless the message names a key that is at fault."""
    wrong = {tuple(fault.path.split(".")[:2]) for fault in faults}
    rest = {
        name: {key: value for key, value in part.items() if (name, key) not in wrong}
        if isinstance(part, dict)
        else part
        for name, part in tree.items()
        if (name,) not in wrong
    }
    try:
        job = job_model().model_validate(rest)
        num_samples = known_num_samples(job.data)
    except (ValidationError, JobError):  # a required key or N is missing: nothing more can be checked
        return []
    names = {place[-1] for place in wrong}
    found = [*key_faults(job, num_samples), *impossible_faults(job, num_samples)]
    return [fault for fault in found if not any(name in str(fault) for name in names)]
