"""Submitting a chain, and telling how it stands."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import Fault, JobError, RunError, unwritable
from hvd_batchgrow.messages.schema_messages import counted
from hvd_batchgrow.slurm.chain_jobs import Link
from hvd_batchgrow.slurm.ledger import (
    BEING_SUBMITTED,
    DONE_BEFORE,
    FOLDER,
    GONE,
    NOT_SUBMITTED,
    Entry,
    Ledger,
    read_ledger,
    samples_done,
    write_ledger,
)
from hvd_batchgrow.slurm.render import TEMPLATES, log_pattern, render
from hvd_batchgrow.slurm.scheduler import Scheduler
from hvd_batchgrow.storage.regular_files import read_regular


@dataclass(frozen=True)
class Site:
    """What the scripts of a chain hold beside the chain itself."""

    template: str
    program: Sequence[str]
    options: Mapping[str, str]
    """Of sbatch, the same for all links."""


@dataclass(frozen=True)
class Script:
    """A link's batch script: where it goes, and its text."""

    path: Path
    text: str


def make_scripts(job: Job, links: Sequence[Link], run: Path, site: Site) -> list[Script]:
    """The scripts of all links; nothing is written.

    Args:
        job: with the ranks of each phase written down.
        links: of the chain.
        run: the run folder, absolute.
        site: the rest.

    Raises:
        JobError: something cannot be written into a script.
    """
    folder = run / FOLDER
    return [
        Script(
            folder / f"link-{k + 1}.sbatch",
            render(
                site.template,
                {
                    "job-name": job.name,
                    "nodes": str(link.nodes),
                    "ntasks-per-node": str(link.ranks_per_node),
                    "output": log_pattern(folder),
                    **site.options,
                },
                site.program,
                [
                    str(folder / "job.toml"), "--runs-dir", str(run.parent), "--resume", "auto",
                    "--phases", link.phases,
                ],
            ),
        )
        for k, link in enumerate(links)
    ]  # fmt: skip


def open_chain(run: Path, links: Sequence[Link], scheduler: Scheduler | None, *, resume: bool) -> Ledger:
    """A new ledger, in which the links that the run has passed already are done.

    Args:
        run: the run folder.
        links: of the whole run.
        scheduler: asked about an older chain; None: it is not asked.
        resume: go on where there is a run.

    Raises:
        RunError: there is a run, and going on was not asked for; or jobs of an older chain are still about.
    """
    before = read_ledger(run)
    done = samples_done(run)
    is_chain = before and any(entry.state != NOT_SUBMITTED for entry in before.entries)
    if not resume and (is_chain or (run / "job.toml").exists()):
        raise RunError(f"{run} holds a run already: add --resume auto to go on with it, or --name NAME for another")
    if before and scheduler:
        # Of all: one that a node has failed, say, was over when it was last asked about, and is queued again.
        live = before.with_states(scheduler.states(before.job_ids())).live_ids()
        if live:
            told = " ".join(map(str, live))
            raise RunError(f"{run} has jobs that wait or run already, and two chains cannot write it: scancel {told}")
    states = [DONE_BEFORE if link.end_samples <= done else NOT_SUBMITTED for link in links]
    return Ledger(run.name, tuple(Entry(link, state=state) for link, state in zip(links, states, strict=True)))


def submit_chain(job: Job, ledger: Ledger, scripts: Sequence[Script], run: Path, scheduler: Scheduler) -> Ledger:
    """Write the scripts, ask whether each could run, and submit them one after the other.

    Args:
        job: what they train; written beside them, so that edits of the job file do not reach a chain that waits.
        ledger: says which links are done already; those have no job.
        scripts: one for each link.
        run: the run folder.
        scheduler: takes them.

    Raises:
        RunError: a script could never run (told of all of them; nothing is submitted), or is refused when it is
            submitted (those before it are taken back); or the ledger cannot be written (likewise).
    """
    folder = run / FOLDER
    left = [(k, script) for k, script in enumerate(scripts) if ledger.entries[k].state != DONE_BEFORE]
    made = [path for path in (folder / "job.toml", *(script.path for _, script in left)) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.toml").write_text(tomli_w.dumps(job.model_dump(mode="json", exclude_none=True)), "utf-8")
        for _, script in left:
            script.path.write_text(script.text, "utf-8")
    except OSError as error:
        raise unwritable(error.filename or folder, error) from None
    refusals = [(k, told) for k, script in left if (told := scheduler.refusal(script.path)) is not None]
    if refusals:
        for path in made:
            path.unlink(missing_ok=True)
        lines = [f"link {k + 1} ({_width(ledger.entries[k].link)}): {told}" for k, told in refusals]
        raise RunError("\n  ".join(["Slurm could never run this chain, and nothing is submitted:", *lines]))
    after: int | None = None
    for k, script in left:
        try:
            # Before and at once after it: a job that nobody remembers would go on by itself.
            write_ledger(run, ledger.being_submitted(k))
            after = scheduler.submit(script.path, after)
            ledger = ledger.with_job(k, after)
            write_ledger(run, ledger)
        except RunError as error:
            raise _taken_back(error, k, ledger, run, scheduler) from None
        except KeyboardInterrupt:
            stopped = RunError(
                "interrupted while sbatch was at it: squeue --me tells whether Slurm has it all the same"
            )
            unknown = ledger if ledger.entries[k].job_id else ledger.being_submitted(k)
            raise _taken_back(stopped, k, unknown, run, scheduler) from None
    return ledger


def _taken_back(error: RunError, index: int, ledger: Ledger, run: Path, scheduler: Scheduler) -> RunError:
    submitted = ledger.live_ids()
    told = " ".join(map(str, submitted))
    with contextlib.suppress(RunError):
        write_ledger(run, ledger)
    if not submitted:
        return RunError(f"link {index + 1}: {error}")
    try:
        scheduler.cancel(submitted)
    except RunError as second:
        return RunError(f"link {index + 1}: {error}\n  and those before it are still there, jobs {told}: {second}")
    with contextlib.suppress(RunError):
        write_ledger(run, ledger.with_states(scheduler.states(submitted)))
    return RunError(f"link {index + 1}: {error}\n  what was submitted is taken back: jobs {told}")


def _width(link: Link) -> str:
    return f"phases {link.phases} on {counted(link.nodes, 'node')}, {counted(link.ranks, 'rank')}"


def table_lines(ledger: Ledger) -> list[str]:
    """One line for each link."""
    return [
        f"link {k + 1}: {_width(entry.link)}, samples {entry.link.start_samples:,} … {entry.link.end_samples:,}: "
        + _state(entry)
        for k, entry in enumerate(ledger.entries)
    ]


def _state(entry: Entry) -> str:
    if entry.job_id is None:
        return entry.state.lower()
    code, _, number = entry.exit_code.partition(":")
    told = [f"job {entry.job_id} {'is gone: Slurm knows no more of it' if entry.state == GONE else entry.state}"]
    told += [f"exit code {code}"] if code not in {"", "0"} else []
    told += [f"signal {number}"] if number not in {"", "0"} else []
    told += [entry.reason] if entry.reason not in {"", "NonZeroExitCode"} else []
    told += [f"queued again {entry.restarts} ×"] if entry.restarts else []
    return ", ".join(told)


def trouble_lines(ledger: Ledger, run: Path) -> Iterator[str]:
    """Why a chain has broken: the first link that failed with the end of its log, and what to do."""
    failed = next(((k, entry) for k, entry in enumerate(ledger.entries) if entry.has_failed), None)
    if failed is None:
        yield from _never_submitted(ledger)
        return
    k, entry = failed
    log = run / FOLDER / f"{ledger.name}-{entry.job_id}.out"
    yield f"link {k + 1} is what broke: {_state(entry)}; the end of {log}:"
    yield from (f"  | {line}" for line in _last_lines(log))
    later = [(str(j + 1), entry) for j, entry in enumerate(ledger.entries) if j > k and entry.has_failed]
    if waiting := [number for number, entry in later if entry.state != GONE]:
        yield f"links waiting for it were cancelled: {', '.join(waiting)}"
    if gone := [number for number, entry in later if entry.state == GONE]:
        yield f"links that Slurm knows no more of: {', '.join(gone)}"
    yield "once it is mended: the command that submitted it, with --resume auto"


def _never_submitted(ledger: Ledger) -> Iterator[str]:
    """Of a chain whose `submit` was killed half-way: nobody will start what it lacks."""
    missing = [str(k + 1) for k, entry in enumerate(ledger.entries) if entry.state == NOT_SUBMITTED]
    unknown = [str(k + 1) for k, entry in enumerate(ledger.entries) if entry.state == BEING_SUBMITTED]
    if not missing and not unknown:
        return
    if missing:
        yield f"links that were never submitted, since that was cut short: {', '.join(missing)}"
    if unknown:
        look = f"squeue --me --name={ledger.name} tells whether Slurm has it: scancel that job"
        yield f"link {unknown[0]} was being submitted when that was cut short; {look}"
    live = " ".join(map(str, ledger.live_ids()))
    first = f"scancel {live}, then " if live else ""
    yield f"{first}the command that submitted it, with --resume auto"


def _last_lines(log: Path, count: int = 8) -> list[str]:
    try:
        return read_regular(log).decode(errors="replace").rstrip().splitlines()[-count:]
    except OSError as error:
        return [f"there is none: {error.strerror or error}"]


def find_template(given: Path | None) -> str:
    """Return the text of the template: the given one, else `slurm/train.sbatch` here, else the one in `TEMPLATES`.

    Raises:
        JobError: there is none, or it is no text.
    """
    places = [given] if given else [Path("slurm/train.sbatch"), TEMPLATES / "train.sbatch"]
    for place in places:
        if not place.exists():
            continue
        if not place.is_file():
            raise JobError([Fault("--template", f"{place} is no file")], "command line")
        try:
            return place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            told = error.strerror if isinstance(error, OSError) else f"no UTF-8 at byte {error.start}"
            raise JobError([Fault("--template", f"{place} cannot be read: {told}")], "command line") from None
    shipped = " or ".join(shlex.quote(str(path)) for path in sorted(TEMPLATES.glob("train*.sbatch")))
    fault = f"{places[0]} is not there; copy {shipped or 'slurm/train.sbatch of the sources'}, and edit it"
    raise JobError([Fault("--template", fault)], "command line")
