"""Time limits of Slurm, and whether a job has time before it is signalled to stop."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.wording import counted

_FORMATS = (
    "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
)


def limit_s(text: str) -> float | None:
    """Return a time limit of Slurm in seconds, infinity for no limit; None: it is not one."""
    if text.lower() in {"infinite", "unlimited"}:
        return math.inf
    if not (found := re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", text)):
        return None
    days, *parts = found.groups()
    counts = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(counts) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(count * unit for count, unit in zip(counts, units, strict=False))
    return seconds or math.inf  # to Slurm, 0 means unlimited


def check_time_limit(template: str, options: Mapping[str, str]) -> None:
    """Raise JobError for a time limit that Slurm does not accept, or that ends before the signal to stop.

    Args:
        template: a batch script, whose options count where `options` has no others.
        options: options of sbatch by their long names.
    """
    given = options.get("time")
    if given is not None and limit_s(given) is None:
        found = re.fullmatch(r"([0-9]+) ?([dhm])\w*", given)
        nearest = f"; nearest: {found[1]}{ {'d': '-0', 'h': ':00:00', 'm': ''}[found[2]] }" if found else ""
        raise JobError([Fault("--time", f"must be {_FORMATS}, got {given!r}{nearest}")], "command line")
    text, signal = given or _last(template, "time"), options.get("signal") or _last(template, "signal")
    limit, at = limit_s(text), re.search(r"@([0-9]+)$", signal)
    if limit is not None and at and limit <= int(at[1]):
        fault = (
            f"{text} is {counted(int(limit), 'second')}, and the run is signalled to save and stop {at[1]} s earlier"
        )
        raise JobError([Fault("--time", f"{fault}; use a longer limit, or a smaller --signal-delay-s")], "command line")


def _last(template: str, option: str) -> str:
    """Return the value of an option in the `#SBATCH` lines of a batch script; sbatch uses the last one."""
    return next(iter(re.findall(rf"^#SBATCH\b.*?\s--{option}[= ](\S+)", template, re.MULTILINE)[::-1]), "")
