"""What a reader needs to trust a report and to make it again: audit, environment, commits, job files, commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.reports import text
from hvd_batchgrow.reports.document import Block, Code, Column, Paragraph, Section, Table
from hvd_batchgrow.reports.order_record import OrderRecord, common_order
from hvd_batchgrow.reports.runs import ReportedRun
from hvd_batchgrow.results.records import number as finite
from hvd_batchgrow.schedule.adaptive.decisions import read_decisions
from hvd_batchgrow.storage.regular_files import read_regular

_LAUNCHERS = {
    "horovod-mpi": "mpirun -np {ranks} ",
    "horovod-gloo": "horovodrun --gloo -np {ranks} ",
    "torch": "torchrun --standalone --no-python --nproc-per-node {ranks} ",
}
"""Prefix of a command, by the first letters of a backend's name."""


def order_section(runs: Sequence[ReportedRun], orders: Sequence[OrderRecord]) -> Section:
    """Return what the records say of the samples that the runs used, and the commands that prove the rest."""
    columns = (
        Column("run", "run"),
        Column("updates", "updates on record", text.integer, is_number=True),
        Column("samples", "up to sample", text.integer, is_number=True),
        Column("is_whole", "record"),
        Column("replaced", "bad samples replaced", text.integer, is_number=True),
        Column("order", "order of samples"),
    )
    references: dict[tuple[int, int], int] = {}
    rows = []
    for k, (run, order) in enumerate(zip(runs, orders, strict=True)):
        first = references.setdefault((run.files.seed, int(run.files.plan["num_samples"])), k)
        same = "" if first == k else _same_order(runs[first].label, common_order(orders[first], order))
        samples = int(order.bounds[-1]) if len(order.bounds) else 0
        rows.append(
            {"run": run.label, "updates": len(order.bounds) - len(order.gaps), "samples": samples,
             "is_whole": _state(order, run.folder / "consumed.jsonl"), "replaced": order.num_replaced, "order": same}
        )  # fmt: skip
    folders = [str(run.folder) for run in runs]
    said = Paragraph(
        "Each update has recorded a digest of its samples. A whole record has every update from sample 0 on, each "
        "where the one before ends. These commands check that each sample was used once per epoch, in the order of "
        "the seed, and print the digests of the final weights:"
    )
    commands = [shlex.join(["hvd-batchgrow", name, *folders]) for name in ("audit", "digest")]
    return Section(
        "Audit and digest",
        (Table("orders", columns, rows), said, Code("", text.clean_block("\n".join(commands)), "sh")),
    )


def _state(order: OrderRecord, path: Path) -> str:
    if order.fault:
        return text.clean(f"damaged: {order.fault}", 300)
    if not len(order.bounds):
        return "has no updates" if path.exists() else f"no {path.name}"
    return f"whole, except for {counted(len(order.gaps), 'gap')} that a resume noted" if order.gaps else "whole"


def _same_order(other: str, found: tuple[int, int | None]) -> str:
    last, different = found
    if different is not None:
        return f"differs from {other} between samples {last:,} and {different:,}"
    return f"same as {other} up to sample {last:,}" if last else f"has no counter in common with {other}"


def environment_section(runs: Sequence[ReportedRun]) -> Section:
    """Return where and with what the last invocation of each run trained; runs with the same values share a column."""
    found = [dict(_environment(run)) for run in runs]
    groups: dict[str, list[int]] = {}
    for k, values in enumerate(found):
        groups.setdefault(repr(values), []).append(k)
    members = list(groups.values())
    names = ["all runs"] if len(members) == 1 else [", ".join(runs[k].label for k in group) for group in members]
    keys = list(dict.fromkeys(key for values in found for key in values))
    columns = (Column("what", ""), *(Column(f"value{k}", name) for k, name in enumerate(names)))
    rows = [{"what": key, **{f"value{k}": found[group[0]].get(key) for k, group in enumerate(members)}} for key in keys]
    return Section("Environment", (Table("environment", columns, rows),))


def _environment(run: ReportedRun) -> Iterator[tuple[str, str]]:
    last = run.files.last_attempt
    hardware, packages, slurm, arithmetic = (
        _object(last.get(key)) for key in ("hardware", "packages", "slurm", "arithmetic")
    )
    values = {
        "host": last.get("host"),
        "device": hardware.get("device"),
        "GPUs per host": hardware.get("gpus_per_host"),
        "CUDA": hardware.get("cuda"),
        "cuDNN": hardware.get("cudnn"),
        "driver": hardware.get("driver"),
        "ranks": last.get("ranks"),
        "backend": last.get("backend"),
        "collectives": hardware.get("collectives"),
        "Python": last.get("python"),
        **{text.clean(name, 40): packages[name] for name in list(packages)[:40]},
        **{text.clean(name, 40): arithmetic[name] for name in list(arithmetic)[:20] if name != "torch"},
        **{text.clean(name, 40): slurm[name] for name in list(slurm)[:20]},
        "working directory": last.get("working_directory"),
        "commit of hvd_batchgrow": _commit(last, "git"),
        "commit of the working directory": _commit(last, "user_git"),
    }
    yield from ((name, text.clean(value, 200)) for name, value in values.items() if value not in (None, ""))


def _commit(attempt: Mapping[str, Any], prefix: str) -> str | None:
    commit = attempt.get(f"{prefix}_commit")
    return f"{commit}{', with changes' if attempt.get(f'{prefix}_diff') else ''}" if commit else None


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def files_section(runs: Sequence[ReportedRun]) -> list[Section]:
    """Return the job file of each run, and what its checkouts differed in from their commits; equal texts once."""
    texts: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        for kind, language, content in _texts(run):
            texts.setdefault((kind, language, content), []).append(run.label)
    blocks = tuple(
        Code(f"{kind} of {', '.join(labels)}", content, language, is_open=False)
        for (kind, language, content), labels in texts.items()
    )
    return [Section("Job files and changes", blocks)] if blocks else []


def _texts(run: ReportedRun) -> Iterator[tuple[str, str, str]]:
    try:
        job = read_regular(run.folder / "job.toml").decode(errors="replace")
        yield "Job file", "toml", text.clean_block(job)
    except OSError:
        pass  # the plan has the job too; a copy of a run may lack the file
    last = run.files.last_attempt
    for key, kind in (("git_diff", "Changes to hvd_batchgrow"), ("user_git_diff", "Changes to the user's code")):
        diff = last.get(key)
        if isinstance(diff, str) and diff and not (key == "user_git_diff" and diff == last.get("git_diff")):
            yield kind, "diff", text.clean_block(diff)


def commands_section(runs: Sequence[ReportedRun], report_command: Sequence[str]) -> Section:
    """Return the recorded command of each run, commands that train the runs again from their job files, and this
    report's."""
    recorded = list(dict.fromkeys(filter(None, (_recorded(run.files.last_attempt) for run in runs))))
    again = [_again(run) for run in runs]
    blocks: list[Block] = []
    if recorded:
        blocks.append(Code("The runs were trained by", "\n".join(recorded), "sh"))
    blocks.append(Code("To train them again", "\n".join(again), "sh"))
    blocks.append(Code("This report was made by", text.clean(shlex.join(report_command), 2000), "sh"))
    return Section("Commands", tuple(blocks))


def _launcher(attempt: Mapping[str, Any]) -> str:
    backend, ranks = str(attempt.get("backend")), finite(attempt.get("ranks"))
    if ranks is None or ranks <= 1:
        return ""
    prefixes = (prefix for name, prefix in _LAUNCHERS.items() if backend.startswith(name))
    return next(prefixes, "mpirun -np {ranks} ").format(ranks=int(ranks))


def _recorded(attempt: Mapping[str, Any]) -> str | None:
    words = attempt.get("argv")
    if not isinstance(words, list) or not words:
        return None
    return text.clean(_launcher(attempt) + shlex.join(["hvd-batchgrow", *map(str, words[1:])]), 2000)


def _again(run: ReportedRun) -> str:
    """Return the command that trains a run again; for a fork, which its job file alone does not make, the recorded."""
    first = next(iter(run.files.attempts), {})
    if start := finite(first.get("start_samples")):
        note = f"# {run.label} continues another run from its checkpoint at sample {start:,.0f}; it was forked by"
        return f"{note}\n{_recorded(first) or '# a command that is not on record'}"
    words = ["hvd-batchgrow", "train", str(run.folder / "job.toml"), "--runs-dir", "again"]
    decisions = run.folder / "decisions.jsonl"
    words += ["--replay", str(decisions)] if _is_replay(decisions) else []
    return text.clean(_launcher(run.files.last_attempt) + shlex.join(words), 2000)


def _is_replay(decisions: Path) -> bool:
    try:
        return read_decisions(decisions)[0] is not None
    except JobError:  # damaged, which the report says elsewhere
        return False
