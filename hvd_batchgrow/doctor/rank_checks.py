"""Checks of the ranks that a launcher has started: equal versions, and correct all-reduces."""

from __future__ import annotations

import json
import platform
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvd_batchgrow.doctor.check import Check, fail, ok
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.train.run.versions import installed_versions

if TYPE_CHECKING:
    from hvd_batchgrow.comm.ranks import Ranks

_NUM_SUMS = 20


def own_report(checks: Sequence[Check]) -> dict[str, Any]:
    """Return what this rank sends to the others: its host, its versions and its checks."""
    versions = {"Python": platform.python_version(), **installed_versions()}
    return {"host": socket.gethostname(), "versions": versions, "checks": [check.to_dict() for check in checks]}


def check_ranks(ranks: Ranks, checks: Sequence[Check]) -> list[Check]:
    """Check versions and all-reduces, and return failed checks of ranks other than 0 too. All ranks call it together.

    Args:
        ranks: that the launcher started.
        checks: of this rank's machine.
    """
    texts = ranks.all_gather_bytes(dump_json(own_report(checks)).encode(), "doctor.reports")
    reports = [json.loads(text) for text in texts]
    return [*other_failures(reports), check_versions(reports), check_sums(ranks)]


def other_failures(reports: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Return failed checks of other ranks that did not fail on rank 0, once per message."""
    seen = {(check["name"], check["found"]) for check in reports[0]["checks"] if check["status"] == "fail"}
    found = []
    for report in reports[1:]:
        for check in report["checks"]:
            key = (check["name"], check["found"])
            if check["status"] == "fail" and key not in seen:
                seen.add(key)
                found.append(fail(f"{check['name']} on {report['host']}", check["found"], check["remedy"]))
    return found


def check_versions(reports: Sequence[Mapping[str, Any]]) -> Check:
    """Check that all ranks have the same packages in the same versions."""
    packages = {package: None for report in reports for package in report["versions"]}
    differences = []
    for package in packages:
        places: dict[str, dict[str, None]] = {}
        for rank, report in enumerate(reports):
            version = report["versions"].get(package, "not installed")
            places.setdefault(version, {})[f"{report['host']} (rank {rank})"] = None
        if len(places) > 1:
            listed = "; ".join(f"{version} on {_first(places[version])}" for version in places)
            differences.append(f"{package}: {listed}")
    if differences:
        remedy = "start all ranks with one Python environment, on a file system that all hosts share"
        return fail("versions", "; ".join(differences), remedy)
    hosts = len({report["host"] for report in reports})
    where = f"{counted(len(reports), 'rank')} on {counted(hosts, 'host')}"
    return ok("versions", f"{where} have the same versions of {counted(len(packages), 'package')}")


def _first(places: Mapping[str, None]) -> str:
    names = list(places)
    return names[0] + (f" and {counted(len(names) - 1, 'other rank')}" if names[1:] else "")


def check_sums(ranks: Ranks) -> Check:
    """Check an all-reduce over all ranks on the devices that training would use, and measure its time.

    Raises:
        CollectiveError: the ranks cannot agree on devices.
    """
    import torch

    from hvd_batchgrow.comm.devices import take_device

    placement = take_device(ranks, "auto", None)
    numbers = torch.zeros(1, device=placement.device)

    def total() -> float:
        numbers.fill_(ranks.rank + 1)
        return float(ranks.all_reduce(numbers, "doctor.sum").item())

    expected = ranks.size * (ranks.size + 1) / 2
    sums, duration = _timed(total)
    how = f"{ranks.collectives or 'one rank'} ({ranks.backend}) on the {placement.device.type.upper()}"
    if {*sums} != {expected}:
        wrong = f"all-reduces of the numbers 1 to {ranks.size} return {sorted({*sums})} instead of {expected:g}"
        return fail("all-reduce", f"{wrong}, over {how}", "--backend torch, or make clean setup")
    found = f"{ranks.size} ranks over {how}: {1000 * duration:.2g} ms for one number"
    return ok("all-reduce", "; ".join([found, *placement.notes]))


def _timed(total: Callable[[], float]) -> tuple[list[float], float]:
    """Call a function `_NUM_SUMS` times; return its results, and the median time in seconds."""
    results, durations = [], []
    for _ in range(_NUM_SUMS):
        start = time.monotonic()
        results.append(total())
        durations.append(time.monotonic() - start)
    return results, statistics.median(durations)
