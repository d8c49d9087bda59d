"""Say what is wrong with a value: pydantic's messages, in the words of a job file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from hvd_batchgrow.messages.wording import shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_WORDS = {
    r"^Value error, must|^\w+ should": "must",
    "^Value error, ": "",
    "^Field required": "is required",
    "a valid dictionary or .*": "a section",
    "a valid dictionary": "a table of keys and values",
    "a valid tuple": "a list",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid number.*": "a number",
    "a valid integer.*": "a whole number",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    " after validation": "",
}
_STEPS = {"ge": 0, "gt": 1, "le": 0, "lt": -1}
"""Distance from a bound to the nearest valid whole number."""


def value_fault(alternatives: Sequence[ErrorDetails]) -> str:
    """Return what a value must be, the value, and the nearest valid one if there is one.

    Args:
        alternatives: why the value fits none of the types that its key accepts.
    """
    # If the value has one of the accepted types, that it lacks the others does not matter.
    alternatives = [detail for detail in alternatives if not detail["type"].endswith("_type")] or alternatives
    first, *others = dict.fromkeys(map(_text, alternatives))
    text = " or ".join([first, *(re.sub("^must (be )?", "", other) for other in others)])
    if alternatives[0]["type"] == "missing":
        return text
    near = "".join(map(_nearest, alternatives)) or _as_list(alternatives[0])
    return f"{text}, got {shown(alternatives[0]['input'])}{near}"


def choice_fault(choices: Sequence[str], value: Any) -> str:
    """Return that a value must be one of the choices, and the most similar one."""
    return f"must be one of {', '.join(choices)}, got {shown(value)}{_most_similar(value, choices)}"


def _text(detail: ErrorDetails) -> str:
    text = detail["msg"]
    for theirs, ours in _WORDS.items():
        text = re.sub(theirs, ours, text)
    return text


def _as_list(detail: ErrorDetails) -> str:
    """Return how a command line gives a list, for a text in place of one: numbers have no quotes."""
    given = detail["input"]
    if detail["type"] != "tuple_type" or not isinstance(given, str):
        return ""
    items = [item.strip() for item in given.split(",")]
    quote = (
        "" if all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", item, re.IGNORECASE) for item in items) else '"'
    )
    return f"; use '[{', '.join(f'{quote}{item}{quote}' for item in items)}]'"


def _nearest(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    for key, bound in context.items():
        if key in _STEPS and (isinstance(bound, int) or not _STEPS[key]):  # no float is nearest to an excluded bound
            return f"; nearest: {shown(bound + _STEPS[key])}"
    return _most_similar(detail["input"], re.findall("'([^']+)'", str(context.get("expected", ""))))


def _most_similar(value: Any, choices: Sequence[str]) -> str:
    near = get_close_matches(value, choices, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f"; nearest: {near[0]!r}" if near else ""
