"""Read a user's TOML file: its plain values, or what is wrong with it and where."""

from __future__ import annotations

import codecs
import json
import re
import stat
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, time
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.errors import Fault, JobError, reason_of
from hvd_batchgrow.messages.suggest import near_path
from hvd_batchgrow.messages.wording import dotted, shown
from hvd_batchgrow.storage.regular_files import read_regular

_MOST_BYTES = 1 << 20
"""Far above the size of any job file; a larger file is a mistake and would take minutes to read."""
_MOST_NESTED = 32
"""Deepest nesting of sections and lists."""
_INT64 = range(-(2**63), 2**63)
_WORDS = {
    r"Cannot declare \((.*?),?\) twice": r"the section \1 appears twice",
    "Cannot overwrite a value": "a key appears twice",
    "Cannot mutate immutable namespace": "a key is added to a table that is already complete",
    "Found invalid character": "a character is not allowed here",
}
"""Plainer words for tomllib's messages."""


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file.

    Raises:
        JobError: it cannot be read, or is not TOML; with line, column and the line itself.
    """
    text = _decoded(path, _read(path))
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _refused(path, _syntax_fault(str(error), text)) from None
    except ValueError as error:  # a number of more digits than Python converts
        raise _refused(path, f"holds a number that cannot be read: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise _refused(path, f"is nested too deeply; at most {_MOST_NESTED} levels") from None


def read_value(text: str) -> Any:
    """Return a value of the command line: TOML such as `{dense = true}`, JSON such as `{"dense": true}`, else text.

    JSON is recognized for tables, lists and quoted text; its numbers, true and false are also TOML.
    """
    with suppress(ValueError, RecursionError):
        tree = tomllib.loads(f"value = {text}")
        if tree.keys() == {"value"}:  # more keys: a line break in the text
            return tree["value"]
    if text.lstrip().startswith(("{", "[", '"')):
        with suppress(ValueError, RecursionError):
            return json.loads(text, parse_constant=float)
    return text


def value_text(value: Any) -> str:
    """Return the text from which `read_value` reads the same value, which must be one that it returns."""
    if isinstance(value, str) and read_value(value) == value:
        return value
    # Not strict JSON, because `read_value` reads Infinity and NaN in a list or table.
    return str(value) if isinstance(value, (float, date, time)) else json.JSONEncoder().encode(value)


def tamed(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Replace the values that no key may hold, and return a fault for each.

    The replaced values are those that make libraries fail even when they compare or print them. Without them the tree
    can be checked for all its other faults.
    """
    faults: list[Fault] = []
    return _tame((), dict(tree), faults), faults


def _tame(place: tuple[Any, ...], value: Any, faults: list[Fault]) -> Any:
    if len(place) > _MOST_NESTED:
        faults.append(Fault(dotted(place[:3]) + "…", f"is nested too deeply; at most {_MOST_NESTED} levels"))
        return 0
    if isinstance(value, Mapping):
        for key in value:
            if not _is_text(key):
                faults.append(Fault(dotted((*place, key)), f"a key must be text without NUL, got {shown(key)}"))
        return {key: _tame((*place, key), item, faults) for key, item in value.items() if _is_text(key)}
    if isinstance(value, (list, tuple)):
        return [_tame((*place, index), item, faults) for index, item in enumerate(value)]
    return _tame_scalar(place, value, faults)


def _tame_scalar(place: tuple[Any, ...], value: Any, faults: list[Fault]) -> Any:
    if isinstance(value, str) and not _is_text(value):
        text = re.sub("[\0\ud800-\udfff]", "", value)
        faults.append(Fault(dotted(place), f"must be text that UTF-8 can hold, without NUL, got {shown(value)}"))
        return text
    if value is None and len(place) > 2:  # inside a table or list; TOML has no null
        faults.append(Fault(dotted(place), "must have a value, got null, which no job file can hold; remove it"))
        return 0
    if isinstance(value, int) and value not in _INT64:
        nearest = _INT64[-1] if value > 0 else _INT64[0]
        faults.append(Fault(dotted(place), f"must fit into 64 bits, got {shown(value)}; nearest: {nearest}"))
        return nearest
    return value


def _is_text(text: str) -> bool:
    # Lone surrogates stand for bytes of the command line that are not UTF-8.
    return "\0" not in text and not re.search("[\ud800-\udfff]", text)


def _refused(path: Path, fault: str) -> JobError:
    return JobError([Fault("", fault)], str(path))


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        # Every rank reads the file, so a huge one is not read.
        data = read_regular(path) if stat.S_ISREG(status.st_mode) and status.st_size <= _MOST_BYTES else None
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        fault = f"cannot be read: {reason_of(error)}{_near(path)}"
        raise _refused(path, fault) from None
    if data is not None:
        return data
    if stat.S_ISREG(status.st_mode):
        fault = f"has {status.st_size} bytes, but a job file has at most {_MOST_BYTES}: is it another file?"
        raise _refused(path, fault)
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
    raise _refused(path, f"is {kind}, not a job file{_near(path)}")


def _near(path: Path) -> str:
    """Suggest a job file with a similar name, or one in the given folder."""
    try:
        if path.is_dir():
            inside = sorted(path.glob("*.toml"))
            return f"; did you mean {inside[0]}?" if inside else ""
        return near_path(path, (other.name for other in path.parent.glob("*.toml")))
    except (OSError, ValueError):
        return ""


def _decoded(path: Path, data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _refused(path, "is UTF-16, but a job file must be UTF-8: save it as UTF-8")
    try:
        # A byte order mark at the start is harmless.
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        byte = error.object[error.start]
        fault = f"is not UTF-8: byte 0x{byte:02x} at line {line}, column {column}"
        raise _refused(path, fault + _quoted(error.object.decode("utf-8", "backslashreplace"), line, column)) from None


def _syntax_fault(message: str, text: str) -> str:
    """Return tomllib's message with the line that it concerns and a mark under the column."""
    found = re.search(r" \((?:at line (\d+), column (\d+)|at end of document)\)$", message)
    text_of_fault = message[: found.start()] if found else message
    for theirs, ours in _WORDS.items():
        text_of_fault = re.sub(theirs, ours, text_of_fault)
    fault = f"is not valid TOML: {text_of_fault[:1].lower()}{text_of_fault[1:]}"
    if not found:
        return fault
    lines = text.split("\n")
    line, column = (int(found[1]), int(found[2])) if found[1] else (len(lines), len(lines[-1]) + 1)
    return f"{fault} at line {line}, column {column}{_quoted(text, line, column)}"


def _quoted(text: str, line: int, column: int) -> str:
    """Return two more lines: a line of the file, and a mark under the column."""
    start = max(0, column - 60)
    cut = text.split("\n")[line - 1][start : start + 100]
    # A character that moves the cursor or reverses the writing direction would misplace the mark.
    plain = "".join(char if char.isprintable() else "�" for char in cut)
    return f"\n    {plain}\n    {' ' * (column - 1 - start)}^"
