"""The run folder: its records, and whether a run may start or resume there."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from hvd_batchgrow.comm.hardware import Hardware
from hvd_batchgrow.comm.ranks import Ranks, RanksLost
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.changed_data import changed_sets, data_changes
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.messages.errors import JobError, RunError, unwritable
from hvd_batchgrow.messages.wording import listed, shown
from hvd_batchgrow.nn.ghost.ghost_choice import kernels_for_cpu
from hvd_batchgrow.results.changed_settings import changes, refuse_changes
from hvd_batchgrow.results.confounds import changed_code
from hvd_batchgrow.results.run_files import load_record, read_attempts, read_record
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.storage.atomic import remove_unfinished, write_atomically, write_file
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.strict_json import json_bytes
from hvd_batchgrow.train.arithmetic_settings import arithmetic
from hvd_batchgrow.train.checkpoints.checkpoint import (
    Checkpoint,
    broadcast_checkpoint,
    checkpoint_paths,
    newest_good,
)
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.train.replay_failure import refuse_suspect
from hvd_batchgrow.train.run.checkout import git, program_checkout
from hvd_batchgrow.train.run.fork import Origin, fork_run
from hvd_batchgrow.train.run.model_description import FILE, ModelDescription
from hvd_batchgrow.train.run.user_code import user_code
from hvd_batchgrow.train.run.versions import installed_versions

_MEANING = ("features", "categories", "label_columns", "classes", "first_label", "validation", "test")
"""Keys of the data's schema that define the meaning of the network's inputs and outputs, and which samples are held
out."""


def open_run(
    folder: Path,
    job: Job,
    plan: Plan,
    ranks: Ranks,
    hardware: Hardware,
    *,
    resume: bool,
    overwrite: bool,
    origin: Origin | None = None,
    check: Callable[[Checkpoint], None] = lambda _: None,
    pretrained: Mapping[str, str] | None = None,
    schema: Mapping[str, Any] | None = None,
    description: ModelDescription | None = None,
    agents: Sequence[str] = (),
    elastic: ElasticState | None = None,
) -> tuple[Checkpoint | None, list[str]]:
    """Prepare a run folder on rank 0, and return the checkpoint to resume from on all ranks.

    Args:
        folder: runs/NAME.
        job: the job about to run.
        plan: its plan.
        ranks: all ranks call this together.
        hardware: what this rank trains on, for `record.json`.
        resume: resume from the newest good checkpoint, if there is one.
        overwrite: first remove a run that exists in the folder.
        origin: checkpoint of another run, from which this run is forked.
        check: raises RunError if a checkpoint does not fit the network.
        pretrained: path and SHA-256 of the file of the initial weights, saved in `record.json`.
        schema: `Datasets.schema` and `fingerprint`, saved in `record.json`; a checkpoint is not resumed with a
            different one.
        description: saved in `model.json`.
        agents: the torchrun processes of these ranks, saved in `record.json`; see `is_restart`.
        elastic: is informed that the folder is open; None: this is the only attempt.

    Returns:
        the checkpoint, or None to start from the beginning; and notes for the user.

    Raises:
        CollectiveError: the folder holds a run, and neither `resume` nor `overwrite` is set; all its checkpoints are
            damaged; settings that affect the weights have changed; or the run cannot be forked.
    """
    notes: list[str] = []
    state = elastic or ElasticState()
    records = _records(job, plan, description)

    def check_on_data(checkpoint: Checkpoint) -> None:
        notes.extend(_check_data(origin.run if origin else folder, schema or {}, is_fork=origin is not None))
        check(checkpoint)
        suspect = origin.run if origin else folder
        notes.extend(refuse_suspect(suspect, checkpoint.samples, is_fork=origin is not None))

    def prepare() -> Checkpoint | None:
        try:
            attempt = _record(ranks, hardware, job)
            if origin is not None:
                checkpoint: Checkpoint | None = fork_run(origin, folder, plan, records, check_on_data, notes)
            elif (checkpoint := _prepare_folder(folder, notes, resume=resume, overwrite=overwrite)) is not None:
                _refuse_other_job(folder, checkpoint, plan)
                check_on_data(checkpoint)
                notes.extend(_allowed_changes(folder, job, attempt))
            else:
                notes.extend(refuse_suspect(folder, None))
                notes.extend(_drop_other_decisions(folder, plan))
            kept = {"data": schema, "pretrained": pretrained}
            start: dict[str, Any] = {"start_samples": checkpoint.samples if checkpoint else 0}
            start |= {"agents": list(agents)} if agents else {}
            _write_records(folder, records, attempt | start, notes, kept)
            state.has_opened = True  # here too, because ranks may be lost before all of them have agreed
        except OSError as error:
            raise unwritable(error.filename or folder, error) from None
        return checkpoint

    checkpoint = ranks.run_on_rank0(prepare)
    state.has_opened = True
    return broadcast_checkpoint(ranks, checkpoint), notes


@contextmanager
def removed_if_unused(folder: Path, elastic: ElasticState, *, overwrite: bool) -> Iterator[None]:
    """If the run fails before its first update, remove the files that it has made; rank 0 only.

    Args:
        folder: runs/NAME; an earlier run in it is kept.
        elastic: counts the updates.
        overwrite: an earlier run is replaced, so its folder is removed too.
    """
    is_run = (folder / "job.toml").exists()
    before = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    kept = {"slurm"} if is_run else before
    try:
        yield
    except RanksLost:  # the next attempt of an elastic job continues here
        raise
    except BaseException:
        if (overwrite or not is_run) and not elastic.num_updates and not checkpoint_paths(folder / "checkpoints"):
            _remove_others(folder, kept)
        raise


def _remove_others(folder: Path, kept: set[str]) -> None:
    with suppress(OSError):  # the user must see the original error
        for path in folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.rmdir()  # fails if some files are kept


def _prepare_folder(folder: Path, notes: list[str], *, resume: bool, overwrite: bool) -> Checkpoint | None:
    checkpoints = folder / "checkpoints"
    is_run = (folder / "job.toml").exists()
    if folder.exists() and not is_run and not _is_ours(folder):
        raise RunError(f"{folder} is not a run folder, and it is not empty: choose another by --name or --runs-dir")
    if overwrite and is_run:
        _remove(folder)
    elif is_run and not resume and ((folder / "record.json").exists() or checkpoint_paths(checkpoints)):
        raise RunError(
            f"{folder} holds a run already: add --resume auto to resume it, --overwrite to replace it, "
            "or --name NAME for a new one"
        )
    if folders := [str(path) for path in checkpoint_paths(checkpoints) if path.is_dir()]:
        # A checkpoint cannot replace a folder, so every attempt would fail at that sample.
        names = ", ".join(folders)
        raise RunError(f"{names}: a folder where the run would write a checkpoint; move it away, and run this again")
    checkpoint, skipped = newest_good(checkpoints)
    notes += [f"skipped a checkpoint: {reason}" for reason in skipped]
    if resume and not is_run:
        state = "holds no run yet" if folder.exists() else "does not exist yet"
        notes.append(f"{folder} {state}: the run starts from the beginning")
    elif is_run and not overwrite and checkpoint is None:
        _refuse_empty_fork(folder)
        notes.append(f"{checkpoints} holds no checkpoint yet: the run starts from the beginning")
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_unfinished(checkpoints)
    return checkpoint


def _refuse_empty_fork(folder: Path) -> None:
    """Raise RunError if a run that holds no checkpoint is a fork: its initial weights were those of a checkpoint."""
    origin = read_record(folder / "record.json", []).get("forked_from")
    if isinstance(origin, dict):
        fault = f"is a fork of {origin.get('run')} at sample {origin.get('samples')} and holds no checkpoint"
        raise RunError(f"{folder} {fault}: remove the folder, and repeat the command that made it")


def _is_ours(folder: Path) -> bool:
    """Return whether it holds only files written before job.toml: a chain's ledger, or those of a killed attempt."""
    names = {path.name for path in folder.iterdir()}
    return names <= {"slurm", "checkpoints", ".job.toml.writing"} and not checkpoint_paths(folder / "checkpoints")


def _remove(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that a kill leaves either the whole run or nothing under its name."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)  # the next removal finds what is left


def _refuse_other_job(folder: Path, checkpoint: Checkpoint, plan: Plan) -> None:
    refuse_changes(folder, plan.job.completed(checkpoint.deciding), plan.job.deciding(plan.num_samples))
    if checkpoint.samples % plan.ghost_batch:
        fault = f"which is in the middle of a ghost batch of {plan.ghost_batch}: no update ends there"
        raise RunError(f"{folder} cannot be resumed from sample {checkpoint.samples:,}, {fault}")


def _drop_other_decisions(folder: Path, plan: Plan) -> list[str]:
    """Before a run starts from the beginning, remove the decisions that another job has made; return notes on them."""
    path = folder / "decisions.jsonl"
    if not path.exists():
        return []
    try:
        before = plan.job.completed(load_job(folder / "job.toml").deciding(plan.num_samples))
    except JobError:
        before = {}
    if not (changed := changes(before, plan.job.deciding(plan.num_samples))):
        return []
    path.unlink()
    return [f"removed {path}: these settings have changed since its decisions: {', '.join(changed)}"]


def _allowed_changes(folder: Path, job: Job, attempt: Mapping[str, Any]) -> list[str]:
    """Return notes on what differs between the last attempt and this one without being a setting of the weights."""
    try:
        before = tomllib.loads(read_regular(folder / "job.toml").decode())
        last = read_attempts(folder / "record.json")[-1]
    except (OSError, ValueError, IndexError):
        return []  # a damaged record is reported elsewhere; the record of a fork has no attempt yet
    last = {"ghost_norm_on_cpu": "PyTorch", **last}
    was, now = ({what: values.get(key) for key, what in _COMPARED.items()} for values in (last, attempt))
    recorded = [key for key in ("packages", "arithmetic") if isinstance(last.get(key), dict)]
    libraries = {key: changes(last[key], attempt[key]) for key in recorded}
    changed_arithmetic = libraries.get("arithmetic", {})
    changed = changes(_flat(before), _flat(_tree(job))) | changes(was, now)
    changed |= libraries.get("packages", {}) | changed_arithmetic
    notes = [f"changed since the last attempt: {key} was {was!r}, is {now!r}" for key, (was, now) in changed.items()]
    folders = {str(Path(__file__).parents[2]): "git", attempt["working_directory"]: "user_git"}
    parts = {place: (f"{name}_commit", f"{name}_diff") for place, name in folders.items()}
    files = changed_code(last, attempt)
    if places := [place for place in parts if any(last.get(key, attempt[key]) != attempt[key] for key in parts[place])]:
        notes.append(f"the git commit or uncommitted changes of {listed(places)} differ from those of the last attempt")
    notes += [f"changed since the last attempt: {listed(files)}"] if files else []
    was_exact = before.get("layout", {}).get("exact", False)
    changed_kernels = {*changed_arithmetic, *(_CHANGE_KERNELS & changed.keys())}
    if (was_exact or job.layout.exact) and changed_kernels:
        keys = ", ".join(sorted(changed_kernels))
        notes.append(f"layout.exact: the weights may differ in bits from a run without the change of {keys}")
    return notes


_COMPARED = {"ranks": "ranks", "ghost_norm_on_cpu": "ghost norms on a CPU", "python": "Python"}
"""Keys of an attempt's record to compare with those of the last one, and their names in messages."""
_CHANGE_KERNELS = {"data.channels_last", "layout.compile", "layout.exact"}
"""Keys that a resume may change and that select different kernels."""


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    sections = {key: value if isinstance(value, dict) else {"": value} for key, value in tree.items()}
    return {f"{s}.{key}".rstrip("."): value for s, section in sections.items() for key, value in section.items()}


def _tree(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude_none=True)


def _records(job: Job, plan: Plan, description: ModelDescription | None) -> dict[str, bytes]:
    described = {} if description is None else {FILE: json_bytes(description.model_dump(mode="json"))}
    return {"job.toml": tomli_w.dumps(_tree(job)).encode(), "plan.json": plan_bytes(plan), **described}


def _check_data(folder: Path, schema: Mapping[str, Any], *, is_fork: bool) -> list[str]:
    """Compare the data with those of a run. A fork may have other samples of the same meaning; returns notes.

    Raises:
        RunError: features, categories or classes differ, or a resumed run has other training samples.
    """
    before = recorded_data(folder)
    try:
        changed = changes({key: before.get(key, schema[key]) for key in _MEANING if key in schema}, schema)
        others = [f"{what}: {was}, now {now}" for what, was, now in data_changes(before, schema)]
        sets = changed_sets(before.get("evaluation_sets", {}), schema.get("evaluation_sets", {}))
    except (ValueError, TypeError):
        return []  # a damaged record, which is reported elsewhere
    lines = [f"{key}: {shown(changed[key][0])}, now {shown(changed[key][1])}" for key in _MEANING if key in changed]
    remedy = "restore the files, or start a new run: --name NAME"
    if lines:
        raise RunError("\n  ".join([f"{folder} was trained on data with another meaning:", *lines, remedy]))
    if others and not is_fork:
        text = listed(others, separator="\n  ")
        raise RunError(f"{folder} was trained on other data:\n  {text}\n  {remedy}, or --fork NAME")
    notes = [f"the training data differ from those of {folder}: {listed(others, separator='; ')}"] if others else []
    return notes + ([f"these differ from the last attempt of {folder}: {listed(sets)}"] if sets else [])


def recorded_data(folder: Path) -> Mapping[str, Any]:
    """Return what `record.json` says about the data of a run; nothing without a run, or of a damaged record."""
    data: Mapping[str, Any] = read_record(folder / "record.json", []).get("data", {})
    return data


def _write_records(
    folder: Path, records: Mapping[str, bytes], attempt: dict[str, Any], notes: list[str], kept: Mapping[str, Any]
) -> None:
    for name, content in records.items():
        write_atomically(folder / name, content)
    path = folder / "record.json"
    record: Mapping[str, Any] = {}
    try:
        record = load_record(path) if path.exists() else {}
    except RunError as error:
        notes.append(f"{error}; a new record replaces it")
    known = {key: dict(value) for key, value in kept.items() if value}
    write_atomically(path, json_bytes({**record, **known, "attempts": [*record.get("attempts", ()), attempt]}))


def write_plan(folder: Path, plan: Plan) -> None:
    """Replace `plan.json` after a trigger has changed the plan.

    Raises:
        RunError: it cannot be written.
    """
    write_file(folder / "plan.json", plan_bytes(plan))


def plan_bytes(plan: Plan) -> bytes:
    """Return the content of `plan.json`."""
    return json_bytes(plan.to_dict())


def _record(ranks: Ranks, hardware: Hardware, job: Job) -> dict[str, Any]:
    """Return the record of this attempt: whatever else may influence the run."""
    here = Path.cwd()
    commit, diff = program_checkout(Path(__file__))
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": installed_versions(),
        "ghost_norm_on_cpu": kernels_for_cpu(),
        "arithmetic": arithmetic(on_gpu=hardware.is_cuda),
        "hardware": asdict(hardware),
        "backend": ranks.backend,
        "ranks": ranks.size,
        "git_commit": commit,
        "git_diff": diff,
        "working_directory": str(here),
        "user_git_commit": git(here, "rev-parse", "HEAD"),
        "user_git_diff": git(here, "diff", "HEAD", "--", "*.py", "*.toml"),
        "user_code": user_code(job.model_dump(mode="json")),
        "slurm": {key: value for key, value in os.environ.items() if key.startswith("SLURM_JOB_")},
    }
