"""Text and numbers as a report shows them. Whatever comes from a run's files passes through here."""

from __future__ import annotations

from typing import Any

from hvd_batchgrow.messages.wording import short_time
from hvd_batchgrow.results.records import number as finite

_MOST_LETTERS = 300
_MOST_BLOCK_LETTERS = 40_000


def clean(value: object, most: int = _MOST_LETTERS) -> str:
    """Return a value as one line of printable text, shortened.

    Control characters, line breaks, and characters that change the direction of writing appear as escapes.
    """
    text = value if isinstance(value, str) else str(value)
    shown = "".join(letter if letter.isprintable() else _escaped(letter) for letter in text[:most])
    return shown + "…" * (len(text) > most)


def clean_block(text: str, most: int = _MOST_BLOCK_LETTERS) -> str:
    """Return text with its line breaks and tabs, otherwise like `clean`; a last line says what was cut."""
    kept = "".join(x if x.isprintable() or x in "\n\t" else _escaped(x) for x in text[:most].replace("\r\n", "\n"))
    return kept if len(text) <= most else f"{kept}\n… and {len(text) - most:,} more characters"


def _escaped(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode() if ord(letter) > 0x7F else f"\\x{ord(letter):02x}"


def integer(value: Any) -> str:
    """Return `12,345`; empty for None."""
    number = finite(value)
    return "" if number is None else f"{number:,.0f}"


def number(value: Any) -> str:
    """Return four significant digits, with separators of thousands; empty for None."""
    x = finite(value)
    if x is None:
        return ""
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e15 else f"{x:.4g}"


def seconds(value: Any) -> str:
    """Return `48 s`, `2:05 min` or `3:07 h`; below 10 s with one decimal; empty for None."""
    x = finite(value)
    if x is None:
        return ""
    return f"{x:.1f} s" if x < 10 else short_time(x)


def percent(value: Any) -> str:
    """Return a fraction as `91.35 %`; empty for None."""
    x = finite(value)
    return "" if x is None else f"{100 * x:.2f} %"


def metric_label(metric: str) -> tuple[str, float]:
    """Return a metric's name with its unit, and the factor of its values: (`accuracy (%)`, 100) for `top1`."""
    return ("accuracy (%)", 100.0) if metric == "top1" else (clean(metric, 40), 1.0)
