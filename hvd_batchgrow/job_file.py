"""Reading a job file: TOML, overrides from the command line, and every fault at once with its path."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from hvd_batchgrow.config import Job
from hvd_batchgrow.data.known import check_data
from hvd_batchgrow.errors import Fault, JobError
from hvd_batchgrow.nn.known import check_network


def load_job(path: Path, overrides: Mapping[str, Any] | None = None) -> Job:
    """Read a job file.

    Args:
        path: a TOML file.
        overrides: dotted key to value, put over what the file says.

    Raises:
        JobError: the file is missing, is no TOML, or has faults; all of them are in the message.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError([Fault("", _cannot_read(path, error))], str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise JobError([Fault("", f"is not valid TOML: {error}")], str(path)) from None
    for key, value in (overrides or {}).items():
        _put(tree, key, value, str(path))
    return parse_job(tree, str(path))


def parse_job(tree: Mapping[str, Any], source: str = "job") -> Job:
    """Check a tree of plain values and freeze it; raises JobError with all faults."""
    try:
        job = Job.model_validate(tree)
    except ValidationError as error:
        raise JobError([_fault(detail) for detail in error.errors()], source) from None
    if faults := [*check_data(job.data), *check_network(job.model)]:
        raise JobError(faults, source)
    return job


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--optim.lr 0.2` and `--optim.lr=0.2` out of a command line: options with a dot in their name.

    Returns:
        the other words; dotted key to value, read as TOML, else as text.

    Raises:
        JobError: a key has no value.
    """
    others: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        key, equals, text = word.partition("=")
        if not key.startswith("--") or "." not in key:
            others.append(word)
            continue
        value = text if equals else next(words, None)
        if value is None or (value.startswith("--") and not equals):
            raise JobError([Fault(key[2:], "has no value on the command line")], "command line")
        overrides[key[2:].replace("-", "_")] = _toml_value(value)
    return others, overrides


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _put(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise JobError([Fault(key, f"{section} is a value, not a section")], source)
    tree[name] = value


def _cannot_read(path: Path, error: Exception) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1, cutoff=0.5)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"cannot be read: {getattr(error, 'strerror', None) or error}{hint}"


def _fault(detail: Mapping[str, Any]) -> Fault:
    """One fault from pydantic's account of it."""
    # Of a section with a choice the location holds the choice too (schedule, grow, factor): no key of the file.
    place = [part for k, part in enumerate(detail["loc"]) if not (k == 1 and part in _choices(detail["loc"][0]))]
    path = ".".join(map(str, place))
    if detail["type"] == "extra_forbidden":
        return Fault(path, f"unknown key{_suggestion(place, detail['loc'])}")
    if detail["type"] in {"union_tag_not_found", "union_tag_invalid"}:
        return _choice_fault(path, detail)
    if detail["type"] == "missing":
        return Fault(path, "is required")
    message = str(detail["msg"]).removeprefix("Value error, ")
    return Fault(path, f"{message[0].lower()}{message[1:]}, got {detail['input']!r}")


def _choice_fault(path: str, detail: Mapping[str, Any]) -> Fault:
    key = f"{path}.{str(detail['ctx']['discriminator']).strip(chr(39))}"
    choices = ", ".join(_choices(path))
    if "tag" in detail["ctx"]:
        return Fault(key, f"must be one of {choices}, got {detail['ctx']['tag']!r}")
    return Fault(key, f"is required: one of {choices}")


def _suggestion(place: Sequence[Any], location: Sequence[Any]) -> str:
    """What the user may have meant by a key that its section does not know."""
    known, key = _keys_beside(location[:-1]), str(place[-1])
    others = [c for c, model in _section_models(str(place[0])).items() if c and key in model.model_fields]
    if len(place) > 1 and others:
        return f" of {location[1]!r}; it belongs to {', '.join(others)}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {'.'.join([*map(str, place[:-1]), near[0]])}?"
    return f"; known here: {', '.join(known)}"


def _section_models(section: str) -> dict[str, type[BaseModel]]:
    """The models that a section may follow, by the choice that picks each; one without a choice is under ""."""
    field = Job.model_fields.get(section)
    if field is None:
        return {}
    models = get_args(field.annotation) or (field.annotation,)
    key = field.discriminator
    return {
        choice: model
        for model in models
        if isinstance(model, type) and issubclass(model, BaseModel)
        for choice in (get_args(model.model_fields[key].annotation) if isinstance(key, str) else ("",))
    }


def _choices(section: Any) -> list[str]:
    return [choice for choice in _section_models(str(section)) if choice]


def _keys_beside(place: Sequence[Any]) -> list[str]:
    if not place:
        return list(Job.model_fields)
    choice = str(place[1]) if len(place) > 1 else ""
    model = _section_models(str(place[0])).get(choice)
    return list(model.model_fields) if model else []
