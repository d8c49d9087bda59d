"""Describe the values that a key allows, and find the valid value nearest to an invalid one.

Both come from the JSON schema of a pydantic model, so each bound is written only once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

Node = Mapping[str, Any]
"""A node of a JSON schema without references."""

_MOST_SHOWN = 80
_NUDGE = 0.001
"""Distance between an exclusive bound and the suggested value."""


def shown(value: Any) -> str:
    """Return a value for one line of a message: shortened, with unprintable characters escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**_MOST_SHOWN:
        return f"a number of {math.floor(math.log10(abs(value))) + 1} digits"
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except (ValueError, RecursionError):  # it holds a number of too many digits, or is nested too deeply
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}… ({len(text)} characters)"


def counted(number: int, noun: str) -> str:
    """Return `1 rank`, `2 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def as_text(value: Any) -> str:
    """Return a value as a user would write it as text; empty for lists, tables and huge numbers."""
    if isinstance(value, bool):
        return str(value).lower()
    is_short = not isinstance(value, int) or abs(value) < 10**_MOST_SHOWN
    return "" if isinstance(value, (list, tuple, Mapping)) or not is_short else str(value)


def dotted(place: Sequence[Any]) -> str:
    """Return the dotted path of a key, quoted as in TOML where necessary."""
    return ".".join(str(part) if re.fullmatch(r"[A-Za-z0-9_-]+", str(part)) else shown(str(part)) for part in place)


def resolved(schema: Node) -> Node:
    """Return a JSON schema with its references replaced; a discriminated union becomes `choices` by `key`."""

    def put(node: Any) -> Any:
        if isinstance(node, Mapping):
            if "$ref" in node:
                target = schema["$defs"][node["$ref"].rpartition("/")[2]]
                return put({**target, **{key: value for key, value in node.items() if key != "$ref"}})
            if "discriminator" in node:
                order = [branch["$ref"] for branch in node["oneOf"]]
                tags = sorted(node["discriminator"]["mapping"].items(), key=lambda tag: order.index(tag[1]))
                choices = {tag: put({"$ref": ref}) for tag, ref in tags}
                return {"choices": choices, "key": node["discriminator"]["propertyName"]}
            return {key: put(value) for key, value in node.items() if key != "$defs"}
        return [put(item) for item in node] if isinstance(node, list) else node

    return put(schema)  # type: ignore[no-any-return]


def child(node: Node, part: Any) -> Node | None:
    """Return the node of a key or of an item, or None if the schema does not have it."""
    if part in node.get("properties", ()):
        return node["properties"][part]  # type: ignore[no-any-return]
    if isinstance(part, int) and part < len(node.get("prefixItems", ())):
        return node["prefixItems"][part]  # type: ignore[no-any-return]
    if isinstance(part, int) and "items" in node:
        return node["items"]  # type: ignore[no-any-return]
    if "additionalProperties" in node and node["additionalProperties"] is not False:
        return node["additionalProperties"]  # type: ignore[no-any-return]
    found = (child(branch, part) for branch in node.get("anyOf", ()))
    return next((branch for branch in found if branch is not None), None)


def allowed(node: Node) -> str:
    """Describe the values that a node allows, such as "a number >= 0 and < 1"."""
    if "choices" in node:
        return f"a section with {node['key']}, one of {', '.join(node['choices'])}"
    if branches := _branches(node):
        return " or ".join(dict.fromkeys(map(allowed, branches)))
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    words: dict[str, Callable[[Node], str]] = {
        "integer": lambda node: f"a whole number {_bounds(node)}".rstrip(),
        "number": _allowed_number,
        "boolean": lambda _: "true or false",
        "string": lambda node: "a path" if node.get("format") == "path" else str(node.get("description", "text")),
        "array": _allowed_list,
        "object": lambda node: "a section" if "properties" in node else "a table of keys and values",
    }
    anything = "text, a finite number, true or false, or a list or table of these"
    return words[node["type"]](node) if "type" in node else anything


def _branches(node: Node) -> list[Node]:
    """Return the alternatives of a node without null: that a key is optional is not worth a word."""
    return [branch for branch in node.get("anyOf", ()) if branch.get("type") != "null"]


def _bounds(node: Node) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " and ".join(f"{sign} {node[key]}" for key, sign in signs.items() if key in node)


def _allowed_number(node: Node) -> str:
    has_both = {"minimum", "exclusiveMinimum"} & set(node) and {"maximum", "exclusiveMaximum"} & set(node)
    return f"a {'' if has_both else 'finite '}number {_bounds(node)}".rstrip()


def _allowed_list(node: Node) -> str:
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])}, each {allowed(node['prefixItems'][0])}"
    least = f" of at least {node['minItems']}" if "minItems" in node else ""
    return f"a list{least}, each {allowed(node.get('items', {}))}"


def nearest(node: Node, value: Any) -> str:
    """Return `; nearest: 8`, or `; such as 0.1` if no value is nearest, or nothing if no value is similar."""
    for branch in _branches(node) or [node]:
        found = _nearest({"default": node.get("default"), **branch}, value)
        if found is not None:
            return f"; {'nearest' if found[1] else 'such as'}: {shown(found[0])}"
    return ""


def _nearest(node: Node, value: Any) -> tuple[Any, bool] | None:
    """Return a valid value, and whether it is the nearest one."""
    if "enum" in node:
        near = get_close_matches(as_text(value), node["enum"], n=1, cutoff=0.5)
        return (near[0], True) if near else None
    kind = node.get("type")
    if kind in {"integer", "number"}:
        return _nearest_number(node, value)
    if kind == "boolean":
        return _nearest_bool(value)
    if kind == "array":
        return _nearest_list(node, value)
    return _nearest_text(node, value) if kind == "string" else None


def _nearest_bool(value: Any) -> tuple[bool, bool] | None:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    found = words.get(as_text(value).strip().lower())
    return None if found is None else (found, True)


def _nearest_number(node: Node, value: Any) -> tuple[float, bool] | None:
    number = _as_number(value)
    if isinstance(number, int):
        number = min(max(number, -(2**63)), 2**63 - 1)
    if number is None or not _is_bounded(node, number):
        default = node.get("default")
        return (default, False) if isinstance(default, (int, float)) else None
    if node["type"] == "integer":
        return _clamped_int(node, number), True
    return _clamped(node, number)


def _as_number(value: Any) -> float | None:
    """Return the number that a text, or a list of one item, probably means."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    try:
        return int(value) if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        return None


def _is_bounded(node: Node, number: float) -> bool:
    """Return whether a possibly infinite number has a nearest finite one."""
    if isinstance(number, int) or math.isfinite(number):
        return True
    bounds = {"maximum", "exclusiveMaximum"} if number > 0 else {"minimum", "exclusiveMinimum"}
    return not math.isnan(number) and bool(bounds & set(node))


def _clamped_int(node: Node, number: float) -> int:
    low = max(node.get("minimum", -(2**63)), node.get("exclusiveMinimum", -(2**63)) + 1)
    high = min(node.get("maximum", 2**63 - 1), node.get("exclusiveMaximum", 2**63) - 1)
    if isinstance(number, float):
        number = math.copysign(2**63, number) if math.isinf(number) else round(number)
    return int(min(max(number, low), high))


def _clamped(node: Node, number: float) -> tuple[float, bool]:
    """Return the number within the bounds. An exclusive bound has no nearest number, so a likely one is suggested."""
    low, above = node.get("minimum", -math.inf), node.get("exclusiveMinimum", -math.inf)
    high, below = node.get("maximum", math.inf), node.get("exclusiveMaximum", math.inf)
    if 1 in {low, above} and 1e-9 < number < 1:  # a factor to multiply by, but ours divide
        return float(f"{1 / number:.6g}"), False
    if number < low or number > high:
        return (low if number < low else high), True
    if number <= above:
        default = node.get("default")
        likely = (
            -number if math.isfinite(number) else above,
            default if isinstance(default, (int, float)) else above + _NUDGE,
        )  # first the number with the other sign
        return next(n for n in (*likely, above + _NUDGE) if above < n <= high and low <= n < below), False
    if number >= below:
        return below - _NUDGE, False
    return number, True


def _nearest_list(node: Node, value: Any) -> tuple[list[Any], bool] | None:
    """Return the nearest valid items, if every item has one."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    kinds: Sequence[Node] = node.get("prefixItems") or [node.get("items", {})] * max(len(values), 1)
    if not values or len(values) < len(kinds):
        default = node.get("default")
        return (list(default), False) if default else None
    found = [_nearest(kind, item) for kind, item in zip(kinds, values, strict=False)]
    near = [item for item in found if item is not None]
    return ([item for item, _ in near], all(exact for _, exact in near)) if len(near) == len(found) else None


def _nearest_text(node: Node, value: Any) -> tuple[str, bool] | None:
    text = as_text(value)
    examples = node.get("examples", ())
    # The text itself, if only its type is wrong; a similar example; the text without invalid characters.
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text[:200]).strip("._-")
    for candidate in (text, *get_close_matches(text, examples, n=1, cutoff=0.5), plain):
        # In JSON schema, $ matches only the end; in Python also before a final line break.
        if candidate and re.search(node.get("pattern", "").replace("$", r"\Z"), candidate):
            return candidate, True
    return (examples[0], False) if examples else None
