"""Values, counts and keys as messages show them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MOST_SHOWN = 80


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


def with_article(noun: str) -> str:
    """Return `a list`, `an ArrayDataset`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def listed(items: Sequence[Any], most: int = 3, *, text: Callable[[Any], str] = str, separator: str = ", ") -> str:
    """Return the first items, and the number of further ones: "a, b and 3 more"."""
    shown = separator.join(map(text, items[:most]))
    also = " and" if separator == ", " else "; and"
    return shown if len(items) <= most else f"{shown}{also} {len(items) - most:,} more"


def dotted(place: Sequence[Any]) -> str:
    """Return the dotted path of a key, quoted as in TOML where necessary."""
    return ".".join(str(part) if re.fullmatch(r"[A-Za-z0-9_-]+", str(part)) else shown(str(part)) for part in place)


def metric_name(metric: str) -> str:
    """Return the name of a metric in words: `accuracy` for `top1`."""
    return "accuracy" if metric == "top1" else metric


def metric_texts(metrics: Mapping[str, float]) -> list[str]:
    """Return each metric with its name: `accuracy 91.35 %`, which is `top1`, or `f1 0.8123`."""
    return [f"{metric_name(name)} {metric_value(name, value)}" for name, value in metrics.items()]


def metric_value(metric: str, value: float) -> str:
    """Return the value of a metric without its name: `91.35 %` for accuracy, otherwise 4 digits."""
    return f"{100 * value:.2f} %" if metric == "top1" else f"{value:.4g}"


def result_text(metric: str, value: float | None) -> str:
    """Return a result with its name: `accuracy 91.35 %`; for None, `accuracy not finite`."""
    return f"{metric_name(metric)} not finite" if value is None else metric_texts({metric: value})[0]


def difference_scale(metric: str) -> tuple[float, str]:
    """Return the factor and unit for differences of a metric: 100 and `points` for accuracy."""
    return (100.0, "points") if metric.removeprefix("average_") == "top1" else (1.0, "")


def short_time(seconds: float) -> str:
    """Return `48 s`, `2:05 min` or `3:07 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"


def amount(done: int, total: int, unit: str) -> str:
    """Return `3 of 6 files`, or `12.3 of 170.5 MB` for 10 MB and more; `total` is 0 if it is unknown."""
    if unit == "bytes" and max(done, total) >= 10**7:
        done_text, total_text, unit = f"{done / 1e6:,.1f}", f"{total / 1e6:,.1f}", "MB"
    else:
        done_text, total_text = f"{done:,}", f"{total:,}"
    return f"{done_text} of {total_text} {unit}" if total else f"{done_text} {unit}"


def time_text(seconds: float) -> str:
    """Like `short_time`, for an estimate, which may be negative or very large."""
    return short_time(max(0.0, seconds)) if seconds < 1e9 else "unknown time"
