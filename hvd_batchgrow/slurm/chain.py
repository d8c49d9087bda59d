"""Submit a chain, and report its state."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import Fault, JobError, RunError, reason_of, unwritable
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.slurm.chain_jobs import ChainJob
from hvd_batchgrow.slurm.ledger import (
    BEING_SUBMITTED,
    DONE_BEFORE,
    GONE,
    NOT_SUBMITTED,
    Entry,
    Ledger,
    read_ledger,
    samples_to_resume_from,
    write_ledger,
)
from hvd_batchgrow.slurm.ledger_file import FOLDER
from hvd_batchgrow.slurm.render import TEMPLATES, log_pattern, render
from hvd_batchgrow.slurm.scheduler import Scheduler, cancel_submitted, refused
from hvd_batchgrow.storage.regular_files import read_regular


@dataclass(frozen=True)
class Site:
    """The parts of the batch scripts that do not depend on the chain."""

    template: str
    program: Sequence[str]
    options: Mapping[str, str]
    """Options of sbatch, the same for all chain jobs."""


@dataclass(frozen=True)
class Script:
    """The batch script of a chain job: its path and its text."""

    path: Path
    text: str


def make_scripts(job: Job, chain_jobs: Sequence[ChainJob], run: Path, site: Site) -> list[Script]:
    """Return the scripts of all chain jobs, without writing them.

    Args:
        job: the job, with explicit ranks for each phase.
        chain_jobs: the jobs of the chain.
        run: the run folder, absolute.
        site: the other parts of the scripts.

    Raises:
        JobError: a value cannot be written into a script.
    """
    folder = run / FOLDER
    return [
        Script(
            folder / f"chain-job-{k + 1}.sbatch",
            render(
                site.template,
                {
                    "job-name": job.name,
                    "nodes": str(chain_job.nodes),
                    "ntasks-per-node": str(chain_job.ranks_per_node),
                    "ntasks": str(chain_job.ranks),  # otherwise a template's would override the line above
                    "output": log_pattern(folder),
                    **site.options,
                },
                site.program,
                [
                    str(folder / "job.toml"), "--runs-dir", str(run.parent), "--resume", "auto",
                    "--phases", chain_job.phases,
                ],
            ),
        )
        for k, chain_job in enumerate(chain_jobs)
    ]  # fmt: skip


def open_chain(run: Path, chain_jobs: Sequence[ChainJob], scheduler: Scheduler | None, *, resume: bool) -> Ledger:
    """Return a new ledger, which marks the chain jobs whose phases are trained as done.

    Args:
        run: the run folder.
        chain_jobs: the chain jobs of the whole run.
        scheduler: queried for the jobs of an older chain; None: not queried.
        resume: continue an existing run.

    Raises:
        RunError: the run exists and `resume` is False, or jobs of an older chain still wait or run, also one whose id
            is unknown because `submit` was killed.
    """
    before = read_ledger(run)
    done = samples_to_resume_from(run)
    is_chain = before and any(entry.state != NOT_SUBMITTED for entry in before.entries)
    if not resume and (is_chain or (run / "job.toml").exists()):
        raise RunError(f"{run} holds a run already: add --resume auto to continue it, or --name NAME for another")
    if before and scheduler:
        # Query all jobs: one that had ended, for instance on a failed node, may have been queued again since.
        live = before.with_states(scheduler.states(before.job_ids())).live_ids()
        if live:
            ids = " ".join(map(str, live))
            raise RunError(f"{run} has jobs that wait or run already, and two chains cannot write it: scancel {ids}")
        unknown = [k for k, entry in enumerate(before.entries, 1) if entry.state == BEING_SUBMITTED]
        if unknown and (queued := scheduler.queued(run.name)):
            raise interrupted(f"chain job {unknown[0]}", run.name, queued)
    entries = (Entry(job, state=DONE_BEFORE if job.end_samples <= done else NOT_SUBMITTED) for job in chain_jobs)
    return Ledger(run.name, tuple(entries))


def interrupted(what: str, name: str, queued: Sequence[int]) -> RunError:
    """Return the error for a job that Slurm may have accepted from a killed `submit`, and jobs of its name."""
    ids = " ".join(map(str, queued))
    look = f"squeue --me --name={name} shows {ids}, which may be that job, and two jobs cannot write one run"
    return RunError(f"submit was interrupted while it submitted {what}; {look}: scancel {ids}")


def submit_chain(job: Job, ledger: Ledger, scripts: Sequence[Script], run: Path, scheduler: Scheduler) -> Ledger:
    """Write the scripts, test whether Slurm could run each of them, and submit them in order.

    Args:
        job: the job to train; written next to the scripts, so that a waiting chain ignores edits of the job file.
        ledger: marks the chain jobs that are done; these are not submitted.
        scripts: one for each chain job.
        run: the run folder.
        scheduler: the scheduler.

    Raises:
        RunError: `sbatch --test-only` refuses scripts (the message lists them, and nothing is submitted); or a
            script is refused later, or the ledger cannot be written (the jobs submitted before are cancelled).
    """
    folder = run / FOLDER
    left = [(k, script) for k, script in enumerate(scripts) if ledger.entries[k].state != DONE_BEFORE]
    made = [path for path in (folder / "job.toml", *(script.path for _, script in left)) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.toml").write_text(tomli_w.dumps(job.model_dump(mode="json", exclude_none=True)), "utf-8")
        for _, script in left:
            script.path.write_text(script.text, "utf-8")
        refusals = [(k, reason) for k, script in left if (reason := scheduler.refusal(script.path)) is not None]
        if refusals:
            named = {f"chain job {k + 1} ({_width(ledger.entries[k].chain_job)})": reason for k, reason in refusals}
            raise refused("this chain", named)
    except BaseException as error:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(error.filename or folder, error) from None
        raise
    after: int | None = None
    for k, script in left:
        try:
            # Write the ledger before and right after sbatch: a job that is not in the ledger would never be cancelled.
            write_ledger(run, ledger.being_submitted(k))
            after = scheduler.submit(script.path, after)
            ledger = ledger.with_job(k, after)
            write_ledger(run, ledger)
        except RunError as error:
            raise _cancel_chain(error, k, ledger, run, scheduler) from None
        except KeyboardInterrupt:
            stopped = RunError("interrupted during sbatch: squeue --me shows whether Slurm has accepted the job")
            unknown = ledger if ledger.entries[k].job_id else ledger.being_submitted(k)
            raise _cancel_chain(stopped, k, unknown, run, scheduler) from None
    return ledger


def _cancel_chain(error: RunError, index: int, ledger: Ledger, run: Path, scheduler: Scheduler) -> RunError:
    """Cancel the submitted jobs after an error, and return the error with their ids."""
    submitted = ledger.live_ids()
    with contextlib.suppress(RunError):
        write_ledger(run, ledger)
    failed = cancel_submitted(RunError(f"chain job {index + 1}: {error}"), submitted, scheduler)
    if submitted:
        with contextlib.suppress(RunError):
            write_ledger(run, ledger.with_states(scheduler.states(submitted)))
    return failed


def _width(chain_job: ChainJob) -> str:
    return f"phases {chain_job.phases} on {counted(chain_job.nodes, 'node')}, {counted(chain_job.ranks, 'rank')}"


def table_lines(ledger: Ledger) -> list[str]:
    """Return one line for each chain job."""
    return [
        f"chain job {k}: {_width(job := entry.chain_job)}, samples {job.start_samples:,} … {job.end_samples:,}: "
        + _state(entry)
        for k, entry in enumerate(ledger.entries, start=1)
    ]


def _state(entry: Entry) -> str:
    if entry.job_id is None:
        return entry.state.lower()
    code, _, number = entry.exit_code.partition(":")
    parts = [f"job {entry.job_id} {'is unknown to Slurm by now' if entry.state == GONE else entry.state}"]
    parts += [f"exit code {code}"] if code not in {"", "0"} else []
    parts += [f"signal {number}"] if number not in {"", "0"} else []
    parts += [entry.reason] if entry.reason not in {"", "NonZeroExitCode"} else []
    parts += [f"requeued {entry.restarts} ×"] if entry.restarts else []
    return ", ".join(parts)


def trouble_lines(ledger: Ledger, run: Path) -> Iterator[str]:
    """Yield why a chain has broken: the first chain job that failed, the end of its log, and the remedy."""
    failed = next(((k, entry) for k, entry in enumerate(ledger.entries) if entry.has_failed), None)
    if failed is None:
        yield from _never_submitted(ledger)
        return
    k, entry = failed
    log = run / FOLDER / f"{ledger.name}-{entry.job_id}.out"
    yield f"chain job {k + 1} broke the chain: {_state(entry)}; the end of {log}:"
    yield from (f"  | {line}" for line in _last_lines(log))
    later = [(str(j + 1), entry) for j, entry in enumerate(ledger.entries) if j > k and entry.has_failed]
    if waiting := [number for number, entry in later if entry.state != GONE]:
        yield f"chain jobs waiting for it were cancelled: {', '.join(waiting)}"
    if gone := [number for number, entry in later if entry.state == GONE]:
        yield f"chain jobs unknown to Slurm by now: {', '.join(gone)}"
    yield "fix the cause, then repeat the command that submitted it, with --resume auto"


def _never_submitted(ledger: Ledger) -> Iterator[str]:
    """Yield the chain jobs that are missing because `submit` was killed; Slurm will never start them."""
    missing = [str(k + 1) for k, entry in enumerate(ledger.entries) if entry.state == NOT_SUBMITTED]
    unknown = [str(k + 1) for k, entry in enumerate(ledger.entries) if entry.state == BEING_SUBMITTED]
    if not missing and not unknown:
        return
    if missing:
        yield f"chain jobs never submitted because submit was interrupted: {', '.join(missing)}"
    if unknown:
        look = f"if squeue --me --name={ledger.name} shows it, scancel that job"
        yield f"submit was interrupted while it submitted chain job {unknown[0]}; {look}"
    live = " ".join(map(str, ledger.live_ids()))
    first = f"scancel {live}, then " if live else ""
    yield f"{first}repeat the command that submitted it, with --resume auto"


def _last_lines(log: Path, count: int = 8) -> list[str]:
    try:
        return read_regular(log).decode(errors="replace").rstrip().splitlines()[-count:]
    except OSError as error:
        return [f"cannot be read: {reason_of(error)}"]


def find_template(given: Path | None) -> str:
    """Return the text of the template: the given one, else `slurm/train.sbatch` here, else the one in `TEMPLATES`.

    Raises:
        JobError: the template does not exist, or is not text.
    """
    places = [given] if given else [Path("slurm/train.sbatch"), TEMPLATES / "train.sbatch"]
    for place in places:
        if not place.exists():
            continue
        if not place.is_file():
            raise JobError([Fault("--template", f"{place} is not a file")], "command line")
        try:
            return place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
            raise JobError([Fault("--template", f"{place} cannot be read: {reason}")], "command line") from None
    shipped = " or ".join(shlex.quote(str(path)) for path in sorted(TEMPLATES.glob("train*.sbatch")))
    fault = f"{places[0]} does not exist; copy {shipped or 'slurm/train.sbatch of the sources'}, and edit it"
    raise JobError([Fault("--template", fault)], "command line")
