"""Find unknown options and invalid values of a command line, all at once.

The parser stops at the first fault, suggests options of other commands, and does not know the bounds of a value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from hvd_batchgrow.cli.common import JobCommand
from hvd_batchgrow.job_file import OTHER_NAMES, job_keys
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.messages.value_faults import value_fault
from hvd_batchgrow.messages.wording import shown


def word_faults(command: type, words: Sequence[str]) -> list[Fault]:
    """Return the unknown options and the invalid values of a command line.

    Args:
        command: the class of the command.
        words: the arguments after the command's name, without overrides of the job file.
    """
    if {"-h", "--help"} & set(words):
        return []
    options, takes_job = options_of(command), issubclass(command, JobCommand)
    faults, seen = [], set()
    for word, following in pairwise([*words, "--"]):
        name, equals, text = word.partition("=")
        value = text if equals else following
        if not word.startswith("--"):
            continue
        if (kind := options.get(name.replace("_", "-"))) is None:
            fault = f"unknown option{_suggestion(name, value, options, takes_job)}"
            faults.append(Fault(name if name.isprintable() else shown(name), fault))
        elif get_origin(kind) is tuple and name in seen:
            fault = f"is given twice, and the parser ignores the first: write {name} A B instead of {name} A {name} B"
            faults.append(Fault(name, fault))
        elif kind is not bool and get_origin(kind) is not tuple and (equals or not value.startswith("--")):
            faults += _value_faults(name, kind, value)
        seen.add(name)
    return faults


def options_of(command: type) -> dict[str, Any]:
    """Return the types of a command's options, such as --runs-dir."""
    types = get_type_hints(command, include_extras=True)
    named = {f"--{field.name.replace('_', '-')}": types[field.name] for field in fields(command)}
    return {
        name: kind
        for name, kind in named.items()
        if not (get_origin(kind) is Annotated and tyro.conf.Positional in get_args(kind))
    }


def _value_faults(name: str, kind: Any, text: str) -> Iterator[Fault]:
    try:
        TypeAdapter(kind).validate_strings(text)
    except ValidationError as error:
        yield Fault(name, value_fault(error.errors(include_url=False)))


def _suggestion(name: str, value: str, options: Mapping[str, Any], takes_job: bool) -> str:
    word = name.lstrip("-").replace("-", "_")
    keys = [OTHER_NAMES[word]] if word in OTHER_NAMES else [key for key in job_keys() if key.endswith(f".{word}")]
    passes_on = "--sbatch" in options  # sbatch has options of many names, so only a small typo is one of ours
    similar = difflib.get_close_matches(name, options, n=1, cutoff=0.8 if passes_on else 0.6)
    if near := [f"--{key}" for key in keys if takes_job] or similar:
        return f"; did you mean {' or '.join(near)}?"
    if passes_on:
        given = f"={value}" if value and not value.startswith("--") else ""
        return f"; an option of sbatch: --sbatch {name.lstrip('-')}{given}"
    keys_too = ", and job-file keys such as --optim.lr" if takes_job else ""
    return f"; this command has {', '.join(options) or 'no options'}{keys_too}"
