"""Read a job file: TOML, overrides from the command line, and all faults at once, each with its key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hvd_batchgrow.config import DataSection, Job, LayoutSection, ModelSection
from hvd_batchgrow.data.sources.specs import check_data, known_num_samples
from hvd_batchgrow.messages.errors import MOST_REPORTED, Fault, JobError
from hvd_batchgrow.messages.schema_messages import Node, allowed, as_text, child, dotted, nearest, resolved, shown
from hvd_batchgrow.nn.checks.model_keys import check_network
from hvd_batchgrow.schedule.job_model import job_model
from hvd_batchgrow.schedule.validation.key_checks import impossible_faults, key_faults
from hvd_batchgrow.storage.toml_file import read_toml, read_value, tamed, value_text


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
        faults += [*_key_faults(error), *_faults_of_nearest_choices(tree, error), *_section_faults(tree)]
        faults += _faults_of_the_rest(tree, faults)
        raise JobError(_in_file_order(faults), source) from None
    if faults := [*faults, *check_data(job.data), *check_network(job.model)]:
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
def _schema() -> Node:
    return resolved(job_model().model_json_schema())


@cache
def job_keys() -> tuple[str, ...]:
    """Return all keys of a job file's sections, such as `optim.lr`."""
    sections = ((name, part) for name, node in _schema()["properties"].items() for part in _variants(node))
    return tuple(dict.fromkeys(f"{name}.{key}" for name, part in sections for key in part.get("properties", ())))


def _variants(node: Node) -> list[Node]:
    """Return a section and the variants of it."""
    return [node, *node.get("choices", {}).values()]


def _in_file_order(faults: Sequence[Fault]) -> list[Fault]:
    """Return one fault for each key, in the order of the sections."""
    order = {name: index for index, name in enumerate(Job.model_fields)}
    first: dict[str, Fault] = {}
    for fault in faults:
        first.setdefault(fault.path, fault)
    return sorted(first.values(), key=lambda fault: order.get(fault.path.partition(".")[0], -1))


def _key_faults(error: ValidationError) -> list[Fault]:
    details = error.errors(include_url=False)
    places = [_found(detail["loc"])[0] for detail in details]
    # For a union of types pydantic reports each type: only the innermost places are kept.
    around = {place[:k] for place in places for k in range(len(place))}
    innermost = [d for d, place in zip(details, places, strict=True) if place not in around]
    faults = [_fault(detail) for detail in innermost[:MOST_REPORTED]]
    # Suggestions take time, so faults that are only counted get none.
    return [*faults, *(Fault(dotted(_found(detail["loc"])[0]), "") for detail in innermost[MOST_REPORTED:])]


def _found(location: Sequence[Any]) -> tuple[tuple[Any, ...], Node]:
    """Return the path of a key in the file, and its node of the schema, from pydantic's location.

    The location also holds the variants of sections (schedule, grow, noise_factor) and types, which are not keys.
    """
    place: list[Any] = []
    node = _schema()
    for k, part in enumerate(location):
        inside = child(node, part)
        if inside is not None:
            place.append(part)
            node = inside
        elif part in node.get("choices", ()):
            node = node["choices"][part]
        elif k == len(location) - 1 and "properties" in node:
            return (*place, part), {}  # an unknown key
    return tuple(place), node


def _fault(detail: Mapping[str, Any]) -> Fault:
    location, kind, value = detail["loc"], detail["type"], detail["input"]
    if kind == "missing" and isinstance(location[-1], int):  # an item: the list is too short
        location, kind = location[:-1], "too_short"
    place, node = _found(location)
    path = dotted(place)
    if kind == "extra_forbidden":
        return Fault(path, f"unknown key{_suggestion(place, location)}")
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        return _choice_fault(place, node, detail)
    if kind == "missing":
        return Fault(path, f"is required: {allowed(node)}")
    if kind == "value_error":
        message = str(detail["msg"]).removeprefix("Value error, ")
        return Fault(path, f"{message[:1].lower()}{message[1:]}, got {shown(value)}")
    return Fault(path, f"must be {allowed(node)}, got {shown(value)}{nearest(node, value)}")


def _choice_fault(place: Sequence[Any], node: Node, detail: Mapping[str, Any]) -> Fault:
    key, choice = dotted([*place, node["key"]]), {"enum": list(node["choices"])}
    if "tag" in detail["ctx"]:
        tag = detail["input"].get(node["key"])
        return Fault(key, f"must be {allowed(choice)}, got {shown(tag)}{nearest(choice, tag)}")
    return Fault(key, f"is required: {allowed(choice)}")


def _suggestion(place: Sequence[Any], location: Sequence[Any]) -> str:
    """Suggest a key for one that its section does not have."""
    key, (_, section) = str(place[-1]), _found(location[:-1])
    known = list(section.get("properties", ()))
    choices = _schema()["properties"].get(str(place[0]), {}).get("choices", {})
    if others := [choice for choice, node in choices.items() if key in node["properties"]]:
        return f" of {location[1]!r}; it belongs to {', '.join(others)}"
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"; did you mean {dotted([*place[:-1], near[0]])}?"
    elsewhere = [other for other in job_keys() if other.endswith(f".{key}")]
    there = f"; there is {', '.join(elsewhere)}" if elsewhere else ""
    return f"{there}; known here: {', '.join(known)}"


# --- faults that others would hide ---------------------------------------------------------------


def _faults_of_nearest_choices(tree: Mapping[str, Any], error: ValidationError) -> list[Fault]:
    """Return the other faults of a section with an invalid variant, checked as the most similar variant."""
    changed = dict(tree)
    for detail in error.errors(include_url=False):
        if detail["type"] == "union_tag_invalid":
            name = str(detail["loc"][0])
            node = _schema()["properties"][name]
            near = difflib.get_close_matches(
                as_text(detail["input"].get(node["key"])), node["choices"], n=1, cutoff=0.5
            )
            changed[name] = {**changed[name], node["key"]: near[0]} if near else changed[name]
    if changed == tree:
        return []
    try:
        job_model().model_validate(changed)
    except ValidationError as second:
        before = {detail["loc"] for detail in error.errors(include_url=False)}
        return [_fault(d) for d in second.errors(include_url=False) if d["loc"] not in before and d["loc"]]
    return []


def _section_faults(tree: Mapping[str, Any]) -> list[Fault]:
    """Return the faults between the keys of sections whose keys are valid one by one."""
    faults = []
    with suppress(ValidationError):
        faults += check_data(DataSection.model_validate(tree.get("data")))
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
