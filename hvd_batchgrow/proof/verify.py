"""The same few updates under several layouts, as real processes, and how far the weights differ."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvd_batchgrow.comm.launch import OF_LAUNCHERS, Comm
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.samples import ReportProgress
from hvd_batchgrow.data.sources import load_source
from hvd_batchgrow.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.interrupt import uninterrupted
from hvd_batchgrow.nn.models import build_model, forward_state, hazards
from hvd_batchgrow.proof.digest import Weights, compare_weights, final_weights, overall_difference
from hvd_batchgrow.schedule.layout import form_layout

_FIRST, _GROWTH = 1e-5, 30.0
_GRACE_S = 5.0


def rounding_limit(num_updates: int, *, exact: bool) -> float:
    """Largest difference, relative to all weights together, that rounding may make; in exact mode none.

    One update differs by 1e-8 to 1e-6; a wrong weight of a piece, by 1e-4 and more. In each further one rounding
    moves some activation over the edge of a ReLU: measured on the quickstart's job, 1e-8, 4e-7 and 2e-5
    after one, two and three. So a few updates tell a fault from rounding, and many do not.
    """
    return 0.0 if exact else _FIRST * _GROWTH ** (num_updates - 1)


@dataclass(frozen=True, order=True)
class Shape:
    """A layout of the first phase's batch: ranks × passes × samples of a pass."""

    ranks: int
    accumulation: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.ranks}x{self.accumulation}x{self.micro_batch}"


@dataclass(frozen=True)
class Compared:
    """What became of one layout."""

    shape: Shape
    weights: Weights
    difference: float
    """From the first layout, `overall_difference`."""
    worst: str
    """Equal to the bit, or how much in the tensor that differs most."""
    passed: bool


def parse_shapes(text: str, global_batch: int, group: int, *, exact: bool) -> list[Shape]:
    """Layouts as they are written: "1x1x8,2x2x2".

    Args:
        text: layouts, with commas between.
        global_batch: B of the job's first phase, which each must form.
        group: γ, which no pass may cut.
        exact: exact mode has one group a pass.

    Raises:
        JobError: naming each that is no layout of this batch, with the arithmetic and the nearest that is.
    """
    faults, shapes = [], []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)[x×]([1-9]\d*)[x×]([1-9]\d*)\s*", word)
        if not match:
            faults.append(Fault("--layouts", f"{word!r} is not RANKSxPASSESxMICRO-BATCH, such as 2x2x{group}"))
            continue
        shape = Shape(*map(int, match.groups()))
        shapes.append(shape)
        faults += [Fault("--layouts", fault) for fault in _faults(shape, global_batch, group, exact=exact)]
    if faults:
        raise JobError(faults, "command line")
    return list(dict.fromkeys(shapes))


def _faults(shape: Shape, global_batch: int, group: int, *, exact: bool) -> list[str]:
    near = ", ".join(map(str, default_shapes(global_batch, group, (shape.ranks,), exact=exact))) or "fewer ranks"
    if shape.micro_batch % group:
        return [f"{shape}: a pass of {shape.micro_batch} would cut ghost batches of {group}; nearest: {near}"]
    if exact and shape.micro_batch != group:
        return [f"{shape}: in exact mode a pass is one ghost batch of {group}; nearest: {near}"]
    groups, room = global_batch // group, shape.ranks * shape.accumulation * shape.micro_batch
    most = -(-groups // shape.ranks)  # of a rank, where they are dealt out in turn
    if groups < shape.ranks or -(-most * group // shape.micro_batch) != shape.accumulation:
        return [f"{shape} takes {room} samples, the first phase's batch is {global_batch}; nearest: {near}"]
    return []


def default_shapes(global_batch: int, group: int, ranks: Sequence[int] = (1, 2, 3, 4), *, exact: bool) -> list[Shape]:
    """All in one pass, and one ghost batch a pass, on each number of ranks that the batch has groups for."""
    shapes = []
    for count in ranks:
        for limit in (group,) if exact else (global_batch, group):
            if global_batch // group >= count:
                layout = form_layout(global_batch, count, group, limit, ragged=True)
                shapes.append(Shape(count, layout.accumulation, layout.micro_batch))
    return list(dict.fromkeys(shapes))


def find_hazards(job: Job, report: ReportProgress) -> tuple[list[str], list[str]]:
    """What in a job's network lets the layout decide something of its results; and notes on what passes change in it.

    Args:
        job: its data are opened, for the shape of their samples.
        report: told of downloads.

    Raises:
        JobError, RunError: data or network cannot be had.
    """
    source = load_source(job.data, job.seed, report)
    torch.manual_seed(job.seed)
    model = build_model(job, source.train.shape, source.num_classes)
    notes = forward_state(job, model, source.train.shape).notes(job.model.name, exact=job.layout.exact)
    return hazards(job, model, source.train.shape), notes


def verify(
    job_file: Path,
    job: Job,
    options: Sequence[str],
    shapes: Sequence[Shape],
    num_updates: int,
    tell: Callable[[str], None],
    comm: Comm = "auto",
) -> list[Compared]:
    """Train a few updates under each layout, and compare the weights with those of the first.

    Args:
        job_file: trained by processes of their own, as a user would start them.
        job: the same, as it is with the options.
        options: of the command line, that are put over the job file.
        shapes: layouts.
        num_updates: how many updates.
        tell: told of progress.
        comm: what ranks talk through.

    Raises:
        RunError: a run failed, or there is no launcher for several ranks.
    """
    results: list[Compared] = []
    with tempfile.TemporaryDirectory(prefix="hvd-batchgrow-verify-") as folder:
        for shape in shapes:
            tell(f"{num_updates} updates as {shape.ranks} × {shape.accumulation} × {shape.micro_batch}")
            _train(job_file, [*options, "--comm", comm], _launcher(shape.ranks, comm), shape, num_updates, Path(folder))
            weights = final_weights(Path(folder) / str(shape))
            first = results[0].weights if results else weights
            difference = overall_difference(first, weights)
            worst = compare_weights(first, weights) if results else "the reference"
            passed = difference <= rounding_limit(num_updates, exact=job.layout.exact)
            results.append(Compared(shape, weights, difference, worst, passed))
    return results


def _train(
    job_file: Path, options: Sequence[str], launcher: Sequence[str], shape: Shape, num_updates: int, folder: Path
) -> None:
    command = [sys.executable, "-m", "hvd_batchgrow.cli", "train", str(job_file), *options]
    command += ["--name", str(shape), "--runs-dir", str(folder), "--updates", str(num_updates)]
    command += ["--layout.max-micro-batch", str(shape.micro_batch), "--layout.ragged", "true"]
    command += ["--layout.growth", "accumulation", "--evaluation.every-epochs", "1e9", "--watch.tensorboard", "false"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = None
    try:
        with uninterrupted():
            process = subprocess.Popen([*launcher, *command], env=_environment(os.environ), **pipes)
        out, errors = process.communicate()
    except KeyboardInterrupt:
        if process:
            _end(process)
        raise
    if process.returncode not in (ExitCode.DONE, ExitCode.STOPPED):
        tail = "\n  ".join((errors + out).strip().splitlines()[-15:])
        raise RunError(f"the run as {shape} ended with {process.returncode}:\n  {tail}")


def _end(process: subprocess.Popen[str]) -> None:
    """A launcher takes its ranks with it, if it is asked to; a rank alone would finish its update first."""
    try:
        process.terminate()
        process.wait(_GRACE_S)
    finally:
        process.kill()
        process.wait()


def _launcher(ranks: int, comm: Comm) -> list[str]:
    if ranks == 1:
        return []
    if shutil.which("mpirun"):
        return ["mpirun", "-np", str(ranks), "--bind-to", "none", "--oversubscribe"]
    if comm != "torch" and shutil.which("horovodrun"):
        return ["horovodrun", "--gloo", "-np", str(ranks)]
    if comm == "horovod":
        raise RunError(
            f"{ranks} ranks need mpirun or horovodrun on PATH; or --comm torch, or --layouts with one rank only"
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    return [*torchrun, "--nproc-per-node", str(ranks)]


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """As root Open MPI wants to be told twice; and ranks that share cores must not share them unevenly."""
    leave = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    # The child is a job of its own, even where this process was started by a launcher.
    return {key: value for key, value in environment.items() if not key.startswith(OF_LAUNCHERS)} | leave
