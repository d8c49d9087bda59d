"""Find all faults of a command line at once, and report them like faults of job files.

The parser itself stops at the first fault, and describes it in its own terms.
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

_OTHER_NAMES = {
    "batch": "schedule.global_batch",
    "batch_size": "schedule.global_batch",
    "learning_rate": "optim.lr",
    "dataset": "data.source",
    "model": "model.name",
    "optimizer": "optim.name",
}
"""Keys of a job file by their names in other trainers."""

_HELP = {"-h", "--help"}


@dataclass(frozen=True)
class Option:
    """A field of a command: its name on the command line, and its allowed values."""

    shown: str
    """`--runs-dir`, or `JOB` for a positional argument."""
    adapter: TypeAdapter[Any]
    node: Node
    is_positional: bool
    is_required: bool

    @property
    def is_flag(self) -> bool:
        """Whether it has no value."""
        return self.node.get("type") == "boolean"

    @property
    def takes_many(self) -> bool:
        """Whether it accepts several values, up to the next option."""
        return self.node.get("type") == "array"

    def faults(self, words: Sequence[str]) -> Iterator[Fault]:
        """Yield the faults of its values."""
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
    """Return all faults of a command line.

    Args:
        commands: the classes of the commands by name.
        words: the arguments without overrides of the job file; the first is the command's name.
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
    """Return the options of a command's class."""
    types = get_type_hints(command, include_extras=True)
    options = []
    for field in fields(command):
        kind = types[field.name]
        is_positional = get_origin(kind) is Annotated and tyro.conf.Positional in get_args(kind)[1:]
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        name = field.name.upper() if is_positional else f"--{field.name.replace('_', '-')}"
        # A required field that follows fields with defaults has tyro.MISSING as its default.
        required = field.default is tyro.MISSING or (field.default is MISSING and field.default_factory is MISSING)
        options.append(Option(name, adapter, adapter.json_schema(), is_positional, required))
    return options


def _faults(options: Sequence[Option], words: list[str]) -> Iterator[Fault]:
    by_name = {option.shown: option for option in options if not option.is_positional}
    positional = [option for option in options if option.is_positional]
    takes_job = "JOB" in {option.shown for option in positional}
    given: set[str] = set()
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        name = name.replace("_", "-")
        if not word.startswith("-"):
            if positional:
                given.add(positional[0].shown)
                positional = positional if positional[0].takes_many else positional[1:]
            else:
                yield Fault(shown(word), "unexpected argument")
            continue
        keys = _keys_called(name) if name not in by_name and takes_job else []
        near = keys or difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)
        option = by_name.get(name) or by_name.get(near[0] if near else "")
        values = [text] if equals else _take_values(option, words)
        if option is None and not equals and (keys or not positional) and words and not words[0].startswith("--"):
            words.pop(0)  # its value
        if name not in by_name:
            keys_too = ", and job-file keys such as --optim.lr" if takes_job else ""
            known = f"this command has {', '.join(by_name) or 'no options'}{keys_too}"
            hint = f"did you mean {' or '.join(near)}?" if near else known
            yield Fault(shown(name) if not name.isprintable() else name, f"unknown option; {hint}")
        elif option:
            given.add(name)
            if option.is_flag and equals:
                yield Fault(name, f"takes no value, got {shown(text)}; omit the option for false")
            elif not option.is_flag:
                yield from option.faults(values)
    for option in options:
        if option.is_required and option.shown not in given:
            yield Fault(option.shown, f"is required: {allowed(option.node)}")


def _keys_called(name: str) -> list[str]:
    """Return options for the job-file keys that end with an option's name, or that other trainers call so."""
    word = name.lstrip("-").replace("-", "_")
    keys = [_OTHER_NAMES[word]] if word in _OTHER_NAMES else [k for k in job_keys() if k.endswith(f".{word}")]
    return [f"--{key}" for key in keys]


def _take_values(option: Option | None, words: list[str]) -> list[str]:
    """Remove the values of an option from the front of the words, and return them."""
    most = 0 if option is None or option.is_flag else len(words) if option.takes_many else 1
    values: list[str] = []
    while len(values) < most and words and not words[0].startswith("--"):
        values.append(words.pop(0))
    return values


def _value(node: Node, word: str) -> Any:
    """Return a word as a number if the option accepts numbers and the word is one, else unchanged."""
    kinds = {node.get("type"), *(branch.get("type") for branch in node.get("anyOf", ()))}
    if "integer" in kinds and re.fullmatch(r"[+-]?[0-9]{1,400}", word):
        return int(word)
    if "number" in kinds:
        try:
            return float(word)
        except ValueError:
            return word
    return word
