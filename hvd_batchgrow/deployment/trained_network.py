"""Load the network of a run with its trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.devices import DeviceKey, visible_gpus
from hvd_batchgrow.comm.ranks import CollectiveError, SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.example import Example, InputForm, random_tokens, source_form
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.tensor_tree import Tree
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import RunError, reason_of
from hvd_batchgrow.nn.build import build_model, forward_state
from hvd_batchgrow.nn.parameters import network_inputs
from hvd_batchgrow.nn.state.forward_state import ForwardState, restored_buffers
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, newest_good
from hvd_batchgrow.train.checkpoints.compatibility import average_notes, check_model_fits
from hvd_batchgrow.train.run.model_description import FILE, ModelDescription, read_description
from hvd_batchgrow.train.run.setup import prepare_rank
from hvd_batchgrow.train.update.forward import autocast
from hvd_batchgrow.train.update.weight_average import set_averages
from hvd_batchgrow.verification.tree_digest import tree_digest


@dataclass(frozen=True)
class TrainedNetwork:
    """The network of a run in evaluation mode, with the weights of a checkpoint."""

    run: Path
    description: ModelDescription
    job: Job
    model: nn.Module
    forward_state: ForwardState
    device: torch.device
    checkpoint: Checkpoint
    is_average: bool
    """Whether parameters and running statistics are their moving averages."""
    form: InputForm
    """Shape of one input sample, (C, H, W) or (features,); real samples of the run's training set, if the job's torch
    Dataset decides what the inputs are."""
    digest: str
    """SHA-256 of parameters and buffers; without the average, as `hvd-batchgrow digest` prints it."""
    notes: tuple[str, ...]
    """A line for each newer checkpoint that is damaged, with the reason; and one if the average lacks statistics."""

    def outputs(self, inputs: Tree) -> Any:
        """Return the network's outputs in the job's precision: float32 (n, outputs), or what a custom network returns.

        Args:
            inputs: preprocessed and normalized, (n, C, H, W) or (n, features); or a tree of tensors (n, …).
        """
        changing = self.forward_state.in_evaluation
        with torch.no_grad(), restored_buffers(self.model, changing), autocast(self.device, self.job.update.precision):
            outputs = self.model(network_inputs(inputs, self.model))
        return outputs.float() if isinstance(outputs, Tensor) else outputs


def load_network(
    run: Path,
    checkpoint: Path | None = None,
    device: DeviceKey = "auto",
    *,
    average: bool = False,
    data: Mapping[str, Any] | None = None,
) -> TrainedNetwork:
    """Build the network of a run, and load its trained weights.

    Args:
        run: a run folder.
        checkpoint: one of its checkpoints; None: its newest good one.
        device: auto: a GPU if one is visible.
        average: load the moving average of the weights.
        data: keys of `[data]` that change how files are read, such as `{"decimal": ","}`.

    Raises:
        JobError: the network cannot be built, or the run's torch Dataset cannot be loaded.
        RunError: the run has no description or no good checkpoint, the checkpoint does not fit the network, or the
            average is requested and the run keeps none.
    """
    description = read_description(run)
    found, notes = read_checkpoint(run, checkpoint)
    section = {**description.job["data"], **(data or {})}
    if data and description.inputs.kind == "rows":
        # The keys are of csv files, which are read whatever the source of the rows was.
        section = {key: value for key, value in section.items() if key != "shape"} | {"source": "csv"}
    tree = {**description.job, "data": section}
    job = job_for_inference(parse_job(tree, str(run / FILE)), device)
    place = inference_device(job)
    form = _input_form(job, description)
    # Networks are built for (H, W, C), as the samples of a source are.
    of_samples = form if isinstance(form, Example) else (*form[1:], form[0])
    torch.manual_seed(job.seed)
    model = build_model(job, of_samples, description.num_outputs).to(place)
    state = forward_state(job, model, of_samples)
    check_model_fits(found, model, run)
    model.load_state_dict(found.model)
    if average:
        notes += tuple(_load_average(model, found, run))
    digest = tree_digest(model.state_dict() if average else found.model)
    if job.data.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.eval()
    return TrainedNetwork(run, description, job, model, state, place, found, average, form, digest, notes)


def _input_form(job: Job, description: ModelDescription) -> InputForm:
    """Return the form of the network's inputs. A run on a torch Dataset must still be able to load it."""
    kind, target = description.inputs.kind, description.task.target
    if kind == "tokens" and target == "tokens":
        return random_tokens(description.inputs.shape[0], description.num_outputs)
    if kind not in {"samples", "tokens"}:
        return description.inputs.shape
    data = job.data.model_copy(update={"workers": 0})
    return source_form(load_source(data, job.seed, lambda *_: None, target), target)


def read_checkpoint(run: Path, path: Path | None) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return a checkpoint of a run, by default its newest good one, and a line for each newer one that is damaged.

    Raises:
        RunError: it is missing or damaged.
    """
    if path is None:
        found, skipped = newest_good(run / "checkpoints")
        if found is None:
            raise RunError(f"{run} holds no checkpoint")
        return found, tuple(f"skipped a checkpoint: {reason}" for reason in skipped)
    try:
        return Checkpoint.from_bytes(read_regular(path)), ()
    except (OSError, RunError) as error:
        raise RunError(f"checkpoint {path}: {reason_of(error)}") from None


def job_for_inference(job: Job, device: DeviceKey) -> Job:
    """Return a job for one process on any machine: without torch.compile, and with tf32 on GPUs only."""
    layout = job.layout.model_copy(update={"device": device, "ranks_per_gpu": None, "compile": False})
    update = job.update
    if update.precision == "tf32" and (device == "cpu" or not visible_gpus().uuids):
        update = update.model_copy(update={"precision": "float32"})
    return job.model_copy(update={"layout": layout, "update": update})


def inference_device(job: Job) -> torch.device:
    """Return the device of this process, and set torch's threads and arithmetic as in training. Raises JobError."""
    try:
        return prepare_rank(job, SingleRank()).device
    except CollectiveError as failure:
        raise failure.error or failure from None


def _load_average(model: nn.Module, checkpoint: Checkpoint, run: Path) -> list[str]:
    """Give a network the averaged weights and running statistics of a checkpoint; return notes for the user.

    Raises:
        RunError: the run keeps no average.
    """
    if not checkpoint.average:
        raise RunError(f"{run} keeps no average of its weights: set update.ema_samples before training")
    set_averages(model, checkpoint.average)
    return average_notes(checkpoint, model)
