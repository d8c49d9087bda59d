"""What is wrong with the words of a command line: all of it at once, in the words used for job files.

The parser itself stops at the first fault, and tells of it in its own terms.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from hvd_batchgrow.job_file import job_keys
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.messages.schema_messages import Node, allowed, nearest, shown

_OFTEN_CALLED = {
    "batch": "schedule.global_batch",
    "batch_size": "schedule.global_batch",
    "learning_rate": "optim.lr",
    "dataset": "data.source",
    "model": "model.name",
    "optimizer": "optim.name",
}
"""Keys of a job file by what other trainers call them."""


_HELP = {"-h", "--help"}


@dataclass(frozen=True)
class Option:
    """A field of a command: what it is called on the command line, and what it may hold."""

    shown: str
    """`--runs-dir`, or `JOB` for a word that is known by its place."""
    adapter: TypeAdapter[Any]
    node: Node
    is_positional: bool
    is_required: bool

    @property
    def is_flag(self) -> bool:
        """Whether it stands alone."""
        return self.node.get("type") == "boolean"

    @property
    def takes_many(self) -> bool:
        """Whether all words up to the next option are its values."""
        return self.node.get("type") == "array"

    def faults(self, words: Sequence[str]) -> Iterator[Fault]:
        """Of its values."""
        if not words and not self.takes_many:
            yield Fault(self.shown, f"has no value; it must be {allowed(self.node)}")
        for word in [] if self.takes_many else words:
            value = _value(self.node, word)
            try:
                self.adapter.validate_python(value)
            except ValidationError:
                fault = f"must be {allowed(self.node)}, got {shown(word)}{nearest(self.node, value)}"
                yield Fault(self.shown, fault)


def word_faults(commands: Mapping[str, type], words: Sequence[str]) -> list[Fault]:
    """All faults of a command line, the command's name first.

    Args:
        commands: by name.
        words: without overrides of the job file.
    """
    names = {"enum": list(commands)}
    if not words:
        return [Fault("command", f"is required: {allowed(names)}")]
    if words[0] not in {*commands, *_HELP}:
        return [Fault("command", f"must be {allowed(names)}, got {shown(words[0])}{nearest(names, words[0])}")]
    if _HELP & set(words):
        return []
    return list(_faults(options_of(commands[words[0]]), list(words[1:])))


def options_of(command: type) -> list[Option]:
    """The fields of a command's class."""
    types = get_type_hints(command, include_extras=True)
    options = []
    for field in fields(command):
        kind = types[field.name]
        is_positional = get_origin(kind) is Annotated and tyro.conf.Positional in get_args(kind)[1:]
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        name = field.name.upper() if is_positional else f"--{field.name.replace('_', '-')}"
        # What tyro finds missing has a default all the same, since it follows fields that have one.
        required = field.default is tyro.MISSING or (field.default is MISSING and field.default_factory is MISSING)
        options.append(Option(name, adapter, adapter.json_schema(), is_positional, required))
    return options


def _faults(options: Sequence[Option], words: list[str]) -> Iterator[Fault]:
    by_name = {option.shown: option for option in options if not option.is_positional}
    places = [option for option in options if option.is_positional]
    takes_job = "JOB" in {option.shown for option in places}
    given: set[str] = set()
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        name = name.replace("_", "-")
        if not word.startswith("-"):
            if places:
                given.add(places[0].shown)
                places = places if places[0].takes_many else places[1:]
            else:
                yield Fault(shown(word), "is a word too many")
            continue
        keys = _keys_called(name) if name not in by_name and takes_job else []
        near = keys or difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)
        option = by_name.get(name) or by_name.get(near[0] if near else "")
        values = [text] if equals else _take_values(option, words)
        if option is None and not equals and (keys or not places) and words and not words[0].startswith("--"):
            words.pop(0)  # its value
        if name not in by_name:
            known = f"known here: {', '.join(by_name) or 'none'}" + (
                ", and keys such as --optim.lr" if takes_job else ""
            )
            hint = f"did you mean {' or '.join(near)}?" if near else known
            yield Fault(shown(name) if not name.isprintable() else name, f"unknown option; {hint}")
        elif option:
            given.add(name)
            if option.is_flag and equals:
                yield Fault(name, f"takes no value, got {shown(text)}; leave it out for false")
            elif not option.is_flag:
                yield from option.faults(values)
    for option in options:
        if option.is_required and option.shown not in given:
            yield Fault(option.shown, f"is required: {allowed(option.node)}")


def _keys_called(name: str) -> list[str]:
    """The options for keys of the job file whose last part is the name of an option, or what others call so."""
    word = name.lstrip("-").replace("-", "_")
    keys = [_OFTEN_CALLED[word]] if word in _OFTEN_CALLED else [k for k in job_keys() if k.endswith(f".{word}")]
    return [f"--{key}" for key in keys]


def _take_values(option: Option | None, words: list[str]) -> list[str]:
    """The values that an option has behind it, taken off the words."""
    most = 0 if option is None or option.is_flag else len(words) if option.takes_many else 1
    values: list[str] = []
    while len(values) < most and words and not words[0].startswith("--"):
        values.append(words.pop(0))
    return values


def _value(node: Node, word: str) -> Any:
    """A word as what it stands for, where that is a number."""
    kinds = {node.get("type"), *(branch.get("type") for branch in node.get("anyOf", ()))}
    if "integer" in kinds and re.fullmatch(r"[+-]?[0-9]{1,400}", word):
        return int(word)
    if "number" in kinds:
        try:
            return float(word)
        except ValueError:
            return word
    return word
