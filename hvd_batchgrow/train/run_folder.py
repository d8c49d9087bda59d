"""The run folder: what is in it, and whether a run may start or go on there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.errors import RunError
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.checkpoint import Checkpoint, newest_good, write_atomically

_PACKAGES = (
    "hvd_batchgrow",
    "torch",
    "horovod",
    "mpi4py",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numpy",
)


def open_run(
    folder: Path, job: Job, plan: Plan, ranks: Ranks, *, resume: bool, overwrite: bool
) -> tuple[Checkpoint | None, list[str]]:
    """Prepare a run folder, on rank 0, and find what to go on from, for all ranks.

    Args:
        folder: runs/NAME.
        job: the job about to run.
        plan: its plan.
        ranks: all of them call this together.
        resume: go on from the newest good checkpoint, where there is one.
        overwrite: remove what is there first.

    Returns:
        the checkpoint, None to start afresh; and notes for the user.

    Raises:
        AgreedFailure: the folder holds a run and neither was asked for; no checkpoint of it is good; or its
            job would lead to other weights.
    """
    notes: list[str] = []

    def prepare() -> bytes | None:
        try:
            data = _prepare_folder(folder, notes, resume=resume, overwrite=overwrite)
            if data is not None:
                _refuse_other_job(folder, Checkpoint.from_bytes(data), plan)
            _write_records(folder, job, plan, ranks, notes)
        except OSError as error:
            raise RunError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from None
        return data

    data = ranks.from_rank0(prepare, "checkpoint")
    return (None if data is None else Checkpoint.from_bytes(data)), notes


def _prepare_folder(folder: Path, notes: list[str], *, resume: bool, overwrite: bool) -> bytes | None:
    checkpoints = folder / "checkpoints"
    is_run = (folder / "job.toml").exists()
    # A chain's ledger and scripts are there before the run is.
    if folder.exists() and not is_run and any(path.name != "slurm" for path in folder.iterdir()):
        raise RunError(f"{folder} is no run folder and not empty: choose another with --name or --runs-dir")
    if overwrite and is_run:
        shutil.rmtree(folder)
    elif is_run and not resume:
        raise RunError(
            f"{folder} holds a run already: add --resume auto to go on with it, --overwrite to replace it, "
            "or --name NAME for another"
        )
    data, skipped = newest_good(checkpoints)
    notes += [f"skipped a checkpoint: {reason}" for reason in skipped]
    checkpoints.mkdir(parents=True, exist_ok=True)
    return data


def _refuse_other_job(folder: Path, checkpoint: Checkpoint, plan: Plan) -> None:
    before, now = checkpoint.deciding, plan.job.deciding(plan.num_samples)
    differing = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if differing:
        changes = [f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in differing]
        raise RunError(
            f"{folder} cannot be resumed by this job, whose weights would be others:\n  "
            + "\n  ".join(changes)
            + "\n  start it as another run: --name NAME"
        )


def _write_records(folder: Path, job: Job, plan: Plan, ranks: Ranks, notes: list[str]) -> None:
    tree = job.model_dump(mode="json", exclude_none=True)
    write_atomically(folder / "job.toml", tomli_w.dumps(tree).encode())
    write_atomically(folder / "plan.json", plan_bytes(plan))
    path = folder / "record.json"
    try:
        lives = json.loads(path.read_text(encoding="utf-8"))["lives"] if path.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        notes.append(f"{path} was damaged ({error}) and begins anew")
        lives = []
    write_atomically(path, _json({"lives": [*lives, _record(ranks)]}))


def plan_bytes(plan: Plan) -> bytes:
    """The content of `plan.json`."""
    return _json(plan.to_dict())


def read_plan(run: Path) -> dict[str, Any]:
    """The plan that a run follows, as `plan --json` prints it. Raises RunError if it cannot be read."""
    try:
        return json.loads((run / "plan.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise RunError(f"{run / 'plan.json'} cannot be read: {error}") from None


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()


def _record(ranks: Ranks) -> dict[str, Any]:
    """What else might decide a run: one entry per start."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "backend": ranks.backend,
        "ranks": ranks.size,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": _git("diff", "HEAD"),
        "slurm": {key: value for key, value in os.environ.items() if key.startswith("SLURM_JOB_")},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the code that runs; None where it is no checkout."""
    command: Sequence[str] = ("git", "-C", str(Path(__file__).parent), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=10)
        return done.stdout.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return None
