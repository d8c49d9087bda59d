"""Custom networks, and those of torchvision and timm: call the user's callable, and convert its norms and dropout."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.task_specs import TASKS
from hvd_batchgrow.data.datasets.example import InputForm
from hvd_batchgrow.data.tensor_tree import tensors_in
from hvd_batchgrow.import_string import NotFound, find_callable
from hvd_batchgrow.messages.errors import Fault, JobError, describe_error
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.nn.checks.gradient_trial import gradient_fault
from hvd_batchgrow.nn.checks.model_keys import single_sample_fault
from hvd_batchgrow.nn.checks.module_kinds import kind_fault
from hvd_batchgrow.nn.dropout import convert_dropout
from hvd_batchgrow.nn.ghost.convert import convert_ghost_batch_norm
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.modes import kept_modes
from hvd_batchgrow.nn.parameters import make_dense, network_inputs, parameter_faults
from hvd_batchgrow.nn.state.extra_state import state_dict_fault
from hvd_batchgrow.nn.state.forward_state import (
    NUM_SAMPLES,
    ForwardState,
    StateFault,
    find_forward_state,
    save_with_state_dict,
)
from hvd_batchgrow.nn.state.saved_state import SavedState
from hvd_batchgrow.nn.state.side_effect_free import (
    blank_samples,
    cloned,
    dry_run,
    kept_generators,
    shape_text,
    trial_samples,
)
from hvd_batchgrow.torchvision_shim import import_torchvision

_PACKAGES = {"torchvision": "torchvision", "timm": "timm torchvision"}
"""Packages to install for the networks of a package."""


def load_own(job: Job, form: InputForm, num_classes: int) -> nn.Module:
    """Call `module:name` with `model.kwargs`, and convert batch norms to ghost norms and dropout to keyed dropout.

    The callable also gets `num_classes`, if its signature accepts it and `model.kwargs` does not set it. Modules
    in the working directory can be imported too. Two forward passes of two samples, one in evaluation and one in
    training, check the network without changing it. During the call, the generators of NumPy and Python are
    seeded by `job.seed`; the caller seeds torch's.

    Args:
        job: gives name, arguments, γ, and the momentum of all ghost norms.
        form: shape of one input sample, (C, H, W) or (features,), or real samples.
        num_classes: number of classes of the data.

    Raises:
        JobError: the callable cannot be imported or called, does not return a network, or its network has a fault.
    """
    name = job.model.name
    factory = _import(job)
    arguments = _arguments(factory, job, num_classes)
    try:
        with kept_generators():
            random.seed(job.seed)
            np.random.seed(job.seed % 2**32)
            made = factory(**arguments)
    except (Exception, SystemExit) as error:  # the user's own code
        raise _refusal(job, f"{_call_text(name, arguments)} failed: {describe_error(error)}") from error
    if not isinstance(made, nn.Module):
        raise _refusal(job, f"{name} must return a torch.nn.Module, returned {type(made).__name__}")
    if fault := kind_fault(made):
        raise _refusal(job, f"{name}: {fault}")
    _initialize_lazy(job, made, form)
    network = convert_dropout(_with_ghost_norms(job, made))
    if fault := state_dict_fault(network):
        raise _refusal(job, f"{name}: {fault}")
    if faults := parameter_faults(network):
        raise JobError([Fault("model.name", f"{name}: {fault}") for fault in faults], job.name)
    make_dense(network)
    if fault := _fault(job, network, form, num_classes):
        raise _refusal(job, f"{_call_text(name, arguments)} {fault}")
    return network


def _import(job: Job) -> Callable[..., Any]:
    package = job.model.name.partition(":")[0].split(".")[0]
    try:
        if package in _PACKAGES:
            import_torchvision()  # timm imports it too
        return find_callable(job.model.name)
    except NotFound as error:
        raise _refusal(job, f"{error}{_to_install(package, error.__cause__)}") from error
    except ImportError as error:
        raise _refusal(job, f"{job.model.name} cannot be imported: {error}{_to_install(package, error)}") from error


def _to_install(package: str, error: BaseException | None) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return ""
    if package not in _PACKAGES:
        package = str(error.name).partition(".")[0]  # what the user's module imports
    if package not in _PACKAGES:
        return ""
    # Without the installed version, pip would replace torch by the newest one.
    return f"; pip install {_PACKAGES[package]} torch=={torch.__version__.split('+')[0]}"


def _arguments(factory: Callable[..., Any], job: Job, num_classes: int) -> dict[str, Any]:
    """Return the keyword arguments for the callable.

    Raises:
        JobError: its signature does not accept them.
    """
    given = copy.deepcopy(job.model.kwargs)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some compiled callables have no signature
        return {"num_classes": num_classes, **given}
    parameters = signature.parameters.values()
    if any(p.name == "num_classes" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        given = {"num_classes": num_classes, **given}
    try:
        signature.bind(**given)
    except TypeError as error:
        fault = f"cannot call {_call_text(job.model.name, given)}: {error}; it accepts {signature}"
        raise JobError([Fault("model.kwargs", fault)], job.name) from None
    return given


def _initialize_lazy(job: Job, network: nn.Module, form: InputForm) -> None:
    """Initialize lazy modules by a forward of two samples. No other tensor changes.

    Raises:
        JobError: the forward fails, or does not reach all lazy modules.
    """
    for training in (False, True):
        if not _lazy_paths(network):
            return
        before = SavedState(network)
        try:
            with torch.no_grad(), kept_modes(network):
                network.train(training)(blank_samples(2, form))
        except Exception as error:  # the user's own code
            fault = f"fails on two samples {shape_text(form)}, from which its lazy modules infer their sizes"
            raise _refusal(job, f"{job.model.name} {fault}: {describe_error(error)}") from error
        finally:
            before.restore(attributes=False)
    if paths := _lazy_paths(network):
        raise _refusal(job, f"{job.model.name}: no forward reaches the lazy {listed(paths)}; give them their sizes")


def _lazy_paths(network: nn.Module) -> list[str]:
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return [name for name, tensor in tensors if is_lazy(tensor)]


def _with_ghost_norms(job: Job, made: nn.Module) -> nn.Module:
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise _refusal(job, f"{job.model.name} has no parameters to train")
    ghost_batch = job.model.ghost_batch
    try:
        network = convert_ghost_batch_norm(made, ghost_batch, momentum=job.model.bn_momentum)
    except ValueError as error:
        raise _refusal(job, f"{job.model.name}: {_in_one_line(error)}") from error
    except Exception as error:  # the user's own train() or eval()
        raise _refusal(job, f"{job.model.name}: its train() or eval() failed: {describe_error(error)}") from error
    for norm in ghost_norms(network):
        if ghost_batch == 1:
            raise JobError([Fault("model.ghost_batch", single_sample_fault(job.model.name))], job.name)
        if norm.ghost_batch != ghost_batch:
            raise _refusal(
                job,
                f"{job.model.name} has a ghost norm of {norm.ghost_batch} samples; all ghost norms must have "
                f"model.ghost_batch = {ghost_batch}",
            )
    return network


def _fault(job: Job, network: nn.Module, form: InputForm, num_outputs: int) -> str | None:
    """Return the fault that forward passes of two samples find; None without a fault."""
    samples = network_inputs(blank_samples(2, form), network)
    spec = TASKS.get(job.task.name)
    shape = next(tensors_in(samples)).shape[1:]
    expected = (2, *spec.output_shape(shape, num_outputs)) if spec else None
    trained = _trained(network)
    for training, when in ((False, "in evaluation"), (True, "in training")):
        try:
            with dry_run(network, 2, training=training):
                output = network(cloned(samples))
        except Exception as error:  # the user's own code
            return f"fails on two samples {shape_text(form)}, {when}: {describe_error(error)}"
        if expected and (given := _wrong_output(output, expected)):
            what = "numbers" if job.task.target == "values" else "logits"
            return f"returns {given} for two samples {shape_text(form)}, {when}; must be {what} {expected}"
        if names := sorted(trained ^ _trained(network)):
            return f"changes requires_grad of {listed(names)} in its forward, {when}; set it where the network is built"
    return None


def _wrong_output(output: Any, expected: tuple[int, ...]) -> str:
    """Describe an output that is not floating-point numbers of the expected shape; empty if it is."""
    if not isinstance(output, Tensor):
        return type(output).__name__
    if output.shape != expected:
        return str(tuple(output.shape))
    if not output.is_floating_point() or output.layout != torch.strided:
        return f"a tensor of {str(output.dtype).removeprefix('torch.')}, {str(output.layout).removeprefix('torch.')},"
    return ""


def _trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def try_own(job: Job, network: nn.Module, form: InputForm) -> ForwardState:
    """Run the trial passes of `find_forward_state` and `gradient_fault`.

    Args:
        job: names the network.
        network: from `load_own`. Buffers that training changes become persistent; nothing else changes.
        form: shape of one input sample, or real samples.

    Raises:
        JobError: a trial fails; or the job is exact, and the network keeps state outside its buffers.
    """
    example = trial_samples(network, NUM_SAMPLES, form)
    try:
        state = find_forward_state(network, example)
        fault = gradient_fault(network, example)
    except StateFault as error:
        raise _refusal(job, f"{job.model.name}: {error}") from None
    except Exception as error:  # the user's own code
        trial = f"two trial passes, forward and backward, over {NUM_SAMPLES} samples {shape_text(form)}"
        raise _refusal(job, f"{job.model.name} fails in {trial}: {describe_error(error)}") from error
    if fault:
        raise _refusal(job, f"{job.model.name}: {fault}")
    if state.attributes and job.layout.exact:
        fault = f"is not possible with {job.model.name}: {state.attributes_fault()}"
        raise JobError([Fault("layout.exact", fault)], job.name)
    save_with_state_dict(network, state.buffers)
    return state


def _call_text(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def _in_one_line(error: ValueError) -> str:
    first, *others = [line.strip() for line in str(error).splitlines()]
    return f"{first} {'; '.join(others)}".strip()


def _refusal(job: Job, fault: str) -> JobError:
    return JobError([Fault("model.name", fault)], job.name)
