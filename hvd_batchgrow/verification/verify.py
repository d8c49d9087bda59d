"""Run a few updates under several layouts, as real processes, and compare them with plain torch autograd."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvd_batchgrow.comm.launcher_env import Backend, without_launcher
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.example import source_form
from hvd_batchgrow.interrupt import uninterrupted
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError, faults_of
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.nn.build import build_model, forward_state, hazards, input_form
from hvd_batchgrow.schedule.layout import form_layout
from hvd_batchgrow.tasks.load_task import load_task
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths
from hvd_batchgrow.train.run.setup import prepare_rank
from hvd_batchgrow.train.task_trial import try_task
from hvd_batchgrow.train.update.rounding_noise import NUM_REPEATS
from hvd_batchgrow.verification.autograd_reference import PlainRun
from hvd_batchgrow.verification.rounding_limits import Deviation, RoundingLimits, States, tensors_of
from hvd_batchgrow.verification.tree_digest import tree_digest

_GRACE_S = 5.0


@dataclass(frozen=True, order=True)
class Shape:
    """A layout of the first phase's batch: ranks × accumulation × micro-batch."""

    ranks: int
    accumulation: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.ranks}x{self.accumulation}x{self.micro_batch}"


@dataclass(frozen=True)
class Compared:
    """The comparison of one layout with plain autograd, and in exact mode with the first layout."""

    shape: Shape
    digest: str
    """SHA-256 of the weights after the last update."""
    deviation: Deviation
    is_identical: bool
    """Whether the digest equals the first layout's."""
    passed: bool
    """Whether rounding explains the deviation, and, in exact mode, the weights are bit-identical."""


def parse_shapes(text: str, global_batch: int, ghost_batch: int, *, exact: bool) -> list[Shape]:
    """Parse layouts such as "1x1x8,2x2x2".

    Args:
        text: comma-separated layouts.
        global_batch: B of the job's first phase. Each layout must process B samples.
        ghost_batch: γ. Each micro-batch must be a multiple of γ.
        exact: in exact mode each micro-batch must be one ghost batch.

    Raises:
        JobError: names each layout that does not fit the batch, with the arithmetic and the nearest that fits.
    """
    faults, shapes = [], []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)[x×]([1-9]\d*)[x×]([1-9]\d*)\s*", word)
        if not match:
            faults.append(
                Fault("--layouts", f"{word!r} is not RANKSxACCUMULATIONxMICRO-BATCH, such as 2x2x{ghost_batch}")
            )
            continue
        shape = Shape(*map(int, match.groups()))
        shapes.append(shape)
        faults += [Fault("--layouts", fault) for fault in _faults(shape, global_batch, ghost_batch, exact=exact)]
    if faults:
        raise JobError(faults, "command line")
    return list(dict.fromkeys(shapes))


def _faults(shape: Shape, global_batch: int, ghost_batch: int, *, exact: bool) -> list[str]:
    near = ", ".join(map(str, default_shapes(global_batch, ghost_batch, (shape.ranks,), exact=exact))) or "fewer ranks"
    if shape.micro_batch % ghost_batch:
        return [
            f"{shape}: a micro-batch of {shape.micro_batch} would split ghost batches of {ghost_batch}; nearest: {near}"
        ]
    if exact and shape.micro_batch != ghost_batch:
        return [f"{shape}: in exact mode a micro-batch must be one ghost batch of {ghost_batch}; nearest: {near}"]
    num_ghost_batches, room = global_batch // ghost_batch, shape.ranks * shape.accumulation * shape.micro_batch
    most = -(-num_ghost_batches // shape.ranks)  # ghost batches of the rank that has the most
    if num_ghost_batches < shape.ranks or -(-most * ghost_batch // shape.micro_batch) != shape.accumulation:
        return [f"{shape} processes {room} samples, but the first phase's batch is {global_batch}; nearest: {near}"]
    return []


def default_shapes(
    global_batch: int, ghost_batch: int, ranks: Sequence[int] = (1, 2, 3, 4), *, exact: bool
) -> list[Shape]:
    """Return, for each usable number of ranks, a layout with the largest micro-batch and one with the smallest."""
    shapes = []
    for count in ranks:
        for limit in (ghost_batch,) if exact else (global_batch, ghost_batch):
            if global_batch // ghost_batch >= count:
                layout = form_layout(global_batch, count, ghost_batch, limit, uneven_ranks=True)
                shapes.append(Shape(count, layout.accumulation, layout.micro_batch))
    return list(dict.fromkeys(shapes))


def find_hazards(job: Job, source: Datasets) -> tuple[list[str], list[str]]:
    """Find what makes the results of a job depend on the layout, and notes: what training changes in its network.

    Raises:
        JobError: the network cannot be built.
    """
    torch.manual_seed(job.seed)
    form = source_form(source, job.task.target)
    model = build_model(job, form, source.num_classes)
    notes = forward_state(job, model, form).notes(job.model.name, exact=job.layout.exact)
    with faults_of(job.name):
        task = load_task(job.task, source.num_classes, source.schema)
    of_task, task_notes = try_task(job, task, model, input_form(job, form), source)
    return [*hazards(job, model, form), *of_task], [*task_notes, *notes]


def verify(
    job_file: Path,
    job: Job,
    source: Datasets,
    options: Sequence[str],
    shapes: Sequence[Shape],
    num_updates: int,
    report: Callable[[str], None],
    backend: Backend = "auto",
) -> list[Compared]:
    """Train a few updates under each layout, and compare the weights after the first and the last of them.

    Args:
        job_file: the file that separate processes train.
        job: the job of that file, with the options applied.
        source: the job's data.
        options: command-line options that override the job file.
        shapes: layouts.
        num_updates: updates to run under each layout.
        report: receives lines of progress.
        backend: communication backend of the ranks.

    Raises:
        RunError: a run failed, or no launcher for several ranks was found.
    """
    results: list[Compared] = []
    limits = None
    with tempfile.TemporaryDirectory(prefix="hvd-batchgrow-verify-") as folder:
        options = [*options, "--backend", backend]
        if job.is_adaptive:  # plain autograd follows the plan, so the trigger must not decide
            (Path(folder) / "decisions.jsonl").touch()
            options += ["--replay", str(Path(folder) / "decisions.jsonl")]
        for shape in shapes:
            report(f"{counted(num_updates, 'update')} as {shape.ranks} × {shape.accumulation} × {shape.micro_batch}")
            _train(job_file, options, _launcher(shape.ranks, backend), shape, num_updates, Path(folder))
            states, digest = _states(Path(folder) / str(shape) / "checkpoints")
            shutil.rmtree(Path(folder) / str(shape))
            # After the first run: its process reports whatever is wrong with the job.
            limits = limits or _measure_limits(job, source, num_updates, report)
            deviation = limits.worst(states)
            is_identical = not results or digest == results[0].digest
            passed = deviation.passed and (is_identical or not job.layout.exact)
            results.append(Compared(shape, digest, deviation, is_identical, passed))
    return results


def _measure_limits(job: Job, source: Datasets, num_updates: int, report: Callable[[str], None]) -> RoundingLimits:
    """Run the same updates by plain autograd, without noise and with it."""
    device = prepare_rank(job, SingleRank()).device
    message = f"{counted(num_updates, 'update')} by plain autograd"
    report(message)
    reference = PlainRun(job, source, device).train(num_updates)
    repeats = []
    for seed in range(1, NUM_REPEATS + 1):
        run = PlainRun(job, source, device, seed)
        report(f"{message}, values changed by ± {run.noise_size:.1e}: {seed}")
        repeats.append(run.train(num_updates))
    return RoundingLimits(reference, repeats)


def _states(folder: Path) -> tuple[States, str]:
    """Return the tensors of the oldest and the newest checkpoint, and the digest of the newest with its extra state."""
    paths = checkpoint_paths(folder)
    oldest, newest = (Checkpoint.from_bytes(path.read_bytes()) for path in (paths[0], paths[-1]))
    return {run.samples: tensors_of(run.model) for run in (oldest, newest)}, tree_digest(newest.model)


def _train(
    job_file: Path, options: Sequence[str], launcher: Sequence[str], shape: Shape, num_updates: int, folder: Path
) -> None:
    command = [sys.executable, "-P", "-m", "hvd_batchgrow.cli", "train", str(job_file), *options]
    command += ["--name", str(shape), "--runs-dir", str(folder), "--max-updates", str(num_updates)]
    command += ["--layout.max-micro-batch", str(shape.micro_batch), "--layout.uneven_ranks", "true"]
    command += [
        "--layout.grow_by",
        "accumulation",
        "--evaluation.every-epochs",
        "1e9",
        "--logging.tensorboard",
        "false",
        "--logging.observers",
        "[]",
    ]
    # A checkpoint after every update; all are kept.
    command += ["--checkpoint.every-epochs", "1e-9", "--checkpoint.keep", str(num_updates)]
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
    # torchrun and horovodrun end with 1 if their ranks end with 75, as they do after --max-updates.
    trained = len(checkpoint_paths(folder / str(shape) / "checkpoints"))
    if process.returncode not in (ExitCode.DONE, ExitCode.STOPPED) and trained < num_updates:
        tail = "\n  ".join((errors + out).strip().splitlines()[-15:])
        raise RunError(f"the run as {shape} ended with {process.returncode}:\n  {tail}")


def _end(process: subprocess.Popen[str]) -> None:
    """Terminate a launcher, which then ends its ranks. Kill it if it has not ended after `_GRACE_S`."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    finally:
        process.kill()
        process.wait()


def _launcher(ranks: int, backend: Backend) -> list[str]:
    if ranks == 1:
        return []
    if shutil.which("mpirun"):
        return ["mpirun", "-np", str(ranks), "--bind-to", "none", "--oversubscribe"]
    if backend != "torch" and shutil.which("horovodrun"):
        return ["horovodrun", "--gloo", "-np", str(ranks)]
    if backend == "horovod":
        raise RunError(
            f"{ranks} ranks need mpirun or horovodrun on PATH; or --backend torch, or --layouts with one rank only"
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    return [*torchrun, "--nproc-per-node", str(ranks)]


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a launcher: without the variables of another launcher, and with root allowed."""
    leave = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    return without_launcher(environment) | leave
