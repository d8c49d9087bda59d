"""Build the network that a job names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.model_specs import OWN, read_name
from hvd_batchgrow.data.datasets.example import Example, InputForm
from hvd_batchgrow.messages.errors import Fault, JobError, describe_error, faults_of
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.nn.checks.deterministic_trial import any_kernels, nondeterministic_layer
from hvd_batchgrow.nn.checks.layout_hazards import NUM_SAMPLES, layout_hazards
from hvd_batchgrow.nn.checks.model_keys import check_shape
from hvd_batchgrow.nn.checks.norm_gradients_trial import NUM_SAMPLES as NUM_NORM_TRIAL
from hvd_batchgrow.nn.checks.norm_gradients_trial import try_norm_gradients
from hvd_batchgrow.nn.freeze import freeze
from hvd_batchgrow.nn.ghost.convert import fuse_relu
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.hadamard import fix_classifier
from hvd_batchgrow.nn.load_weights import load_weights
from hvd_batchgrow.nn.modes import modes_of, norms_out_of_mode
from hvd_batchgrow.nn.norm_gradients import refuse_compiled
from hvd_batchgrow.nn.own_network import load_own, try_own
from hvd_batchgrow.nn.state.forward_state import NUM_SAMPLES as NUM_TRIAL
from hvd_batchgrow.nn.state.forward_state import ForwardState
from hvd_batchgrow.nn.state.side_effect_free import trial_samples
from hvd_batchgrow.nn.weights_file import WeightsFile
from hvd_batchgrow.schedule.rounding import half_up


def build_model(job: Job, form: InputForm, num_classes: int) -> nn.Module:
    """Build the network that a job names, with initial weights from torch's generator, and freeze `model.freeze`.

    Args:
        job: of `parse_job`, which has checked `[model]`.
        form: shape of the source's samples: (H, W, C), (features,), or (0, 0, C) before cropping; or real samples.
        num_classes: number of classes.

    Raises:
        JobError: the network does not accept such samples, a custom network has a fault, such as norms that only its
            constructor put into evaluation mode, or a pattern of `model.freeze` matches nothing.
    """
    network = _build(job, form, num_classes)
    faults = freeze(network, job.model.freeze) if job.model.freeze else []
    if names := norms_out_of_mode(network):
        fault = f"{job.model.name} returns norms in evaluation mode ({listed(names)}), which train() puts into training"
        faults.append(Fault("model.name", f"{fault}; keep them in evaluation in its train(), or use model.freeze"))
    norms = list(ghost_norms(network))
    in_training = modes_of(network, training=True)
    if job.model.precise_bn_samples and not any(in_training[norm] for norm in norms):
        frozen = "model.freeze freezes" if job.model.freeze else f"{job.model.name} keeps in evaluation mode"
        why = f"{frozen} all norms" if norms else f"{job.model.name} has no batch norm"
        faults.append(Fault("model.precise_bn_samples", f"has no effect: {why}"))
    if faults:
        raise JobError(faults, job.name)
    return network


def load_pretrained(job: Job, model: nn.Module, file: WeightsFile, num_classes: int) -> list[str]:
    """Load the pretrained weights of a job into its network; return notes for the user.

    Args:
        job: allows a new classifier, or does not.
        model: from `build_model`.
        file: from `read_weights`.
        num_classes: number of classes.

    Raises:
        JobError: the weights do not fit.
    """
    with faults_of(job.name):
        return load_weights(model, file, num_classes, allow_new_head=job.model.allow_new_head)


def _build(job: Job, form: InputForm, num_classes: int) -> nn.Module:
    model, shape = job.model, _shape_of_images_or_rows(job, form)
    if shape and (faults := check_shape(model, shape)):
        raise JobError(faults, job.name)
    spec, numbers = read_name(model.name)
    if spec.build is None:
        with any_kernels():
            return load_own(job, input_form(job, form), num_classes)
    given = {key: value for key in spec.keys if (value := getattr(model, key)) is not None}
    try:
        network = fuse_relu(spec.build(shape[-1], num_classes, **numbers, **given))
    except (RuntimeError, MemoryError) as error:  # larger than the memory, or than torch's sizes
        fault = f"{model.name!r} for {num_classes} classes cannot be built: {str(error).partition(chr(10))[0]}"
        raise JobError([Fault("model", fault)], job.name) from None
    try:
        if model.classifier == "hadamard":
            fix_classifier(network)
    except ValueError as error:
        raise JobError([Fault("model.classifier", f"{model.name!r}: {error}")], job.name) from None
    return network


def check_deterministic(job: Job, model: nn.Module, form: InputForm) -> None:
    """Check that an exact job's network has deterministic kernels on its device, if torch is set to require them.

    Args:
        job: names the network.
        model: from `build_model`, on the device.
        form: as `build_model` takes it.

    Raises:
        JobError: a layer lacks one, or a trial pass fails.
    """
    if not (job.layout.exact and torch.are_deterministic_algorithms_enabled()):
        return
    device = next(model.parameters()).device.type
    try:
        layer = nondeterministic_layer(model, trial_samples(model, NUM_TRIAL, input_form(job, form)))
    except Exception as error:  # the user's own code
        fault = f"{job.model.name} fails in a trial pass over {NUM_TRIAL} samples: {describe_error(error)}"
        raise JobError([Fault("model.name", fault)], job.name) from error
    if layer:
        other = "layout.threads_per_rank = 1" if device == "cpu" else 'layout.device = "cpu"'
        remedy = f"use another layer, layout.exact = false, or {other}"
        fault = f"{job.model.name} has no deterministic kernel on {device} at {layer}; {remedy}"
        raise JobError([Fault("layout.exact", fault)], job.name)


def check_norm_layers(job: Job, model: nn.Module, form: InputForm) -> None:
    """Check that the gradient noise of the norm layers can be measured, if the job does so.

    Args:
        job: names the estimator.
        model: from `build_model`, on the device; not compiled yet.
        form: as `build_model` takes it.

    Raises:
        JobError: it cannot be measured, or a trigger needs it and an update of the first batch is a single unit.
    """
    noise = job.gradient_noise
    if noise.estimator == "micro_batches" or not (noise.measure or job.trigger.measures_gradients):
        return
    example = trial_samples(model, NUM_NORM_TRIAL, input_form(job, form))
    try:
        recorder = try_norm_gradients(model, example, mixes_samples=job.data.mixes_samples)
        if job.layout.compile:
            refuse_compiled(recorder)
    except Exception as error:  # a ValueError of the trial, or one of the user's own code
        why = str(error) if isinstance(error, ValueError) else describe_error(error)
        fault = f"'norm_layers' is not possible with {job.model.name}: {why}; use 'micro_batches'"
        raise JobError([Fault("gradient_noise.estimator", fault)], job.name) from error
    batch, ghost_batch = half_up(job.schedule.enlarged_batch), job.model.ghost_batch
    if recorder.unit == "ghost batch" and batch <= ghost_batch and job.trigger.measures_gradients:
        fault = f"{batch} is one ghost batch, so the norm layers have one gradient: tr(Σ) needs two"
        raise JobError([Fault("schedule.global_batch", f"{fault}; use >= {2 * ghost_batch}")], job.name)


def hazards(job: Job, model: nn.Module, form: InputForm) -> list[str]:
    """Return what makes the results of a custom network depend on the layout, as `layout_hazards` finds it.

    Args:
        job: names the network. A built-in one has no hazards.
        model: from `build_model`.
        form: as `build_model` takes it.

    Raises:
        JobError: a trial pass of the network fails.
    """
    if read_name(job.model.name)[0] is not OWN:
        return []
    try:
        return layout_hazards(model, input_form(job, form))
    except Exception as error:  # the user's own code
        fault = f"{job.model.name} fails in a trial pass over up to {NUM_SAMPLES} samples: {describe_error(error)}"
        raise JobError([Fault("model.name", fault)], job.name) from error


def forward_state(job: Job, model: nn.Module, form: InputForm) -> ForwardState:
    """Find by trial passes which state of a custom network training changes, apart from ghost norms.

    Args:
        job: names the network. A built-in one has no such state.
        model: from `build_model`; buffers that training changes become part of its `state_dict`.
        form: as `build_model` takes it.

    Raises:
        JobError: the trial fails; or the job is exact, and the network keeps state outside its buffers.
    """
    if read_name(job.model.name)[0] is not OWN:
        return ForwardState()
    return try_own(job, model, input_form(job, form))


def _shape_of_images_or_rows(job: Job, form: InputForm) -> tuple[int, ...]:
    """Return (H, W, C) or (features,); for real samples of another form, () if the network is `module:name`.

    Raises:
        JobError: a network of this package does not accept real samples of this form.
    """
    if not isinstance(form, Example):
        return _cropped(job, form)
    if form.shape is not None:
        return (*form.shape[1:], form.shape[0])
    if read_name(job.model.name)[0] is OWN:
        return ()
    fault = (
        f"{job.model.name!r} accepts floating-point images (C, H, W) or rows (features,), but the samples are {form}"
    )
    raise JobError(
        [Fault("model.name", f"{fault}; use a network 'module:name', which receives them unchanged")], job.name
    )


def input_form(job: Job, form: InputForm) -> InputForm:
    """Return the shape of one input sample of a network, (C, H, W) or (features,), or the real samples."""
    if isinstance(form, Example):
        return form
    shape = _cropped(job, form)
    return (shape[-1], *shape[:-1])


def _cropped(job: Job, sample_shape: Sequence[int]) -> tuple[int, ...]:
    """Return (H, W, C) or (features,), with the job's image size if the samples are to be cropped."""
    shape = tuple(sample_shape)
    if len(shape) == 3 and shape[0] == 0 and job.data.image_size:
        return (job.data.image_size, job.data.image_size, shape[2])
    return shape
