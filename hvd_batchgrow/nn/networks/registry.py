"""The networks that a job can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.model_names import FAMILIES, read_name
from hvd_batchgrow.import_string import describe_error
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.nn.checks.layout_hazards import NUM_SAMPLES, layout_hazards
from hvd_batchgrow.nn.checks.model_keys import check_network, check_shape
from hvd_batchgrow.nn.ghost.convert import fuse_relu
from hvd_batchgrow.nn.networks.alexnet import AlexNet
from hvd_batchgrow.nn.networks.cifar_resnet import CifarResNet
from hvd_batchgrow.nn.networks.dense import DenseLayers
from hvd_batchgrow.nn.networks.small_conv_net import SmallConvNet
from hvd_batchgrow.nn.networks.user import load_own, try_own
from hvd_batchgrow.nn.networks.vgg import Vgg
from hvd_batchgrow.nn.networks.wide_resnet import WideResNet
from hvd_batchgrow.nn.state.forward_state import ForwardState

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small_conv_net": SmallConvNet,
    "wrn": WideResNet,
    "resnet": CifarResNet,
    "vgg": Vgg,
    "alexnet": AlexNet,
    "dense7": DenseLayers,
}


def check_model(job: Job) -> None:
    """Raises JobError if a job names a network that is not here, or gives it keys that it would not use."""
    if faults := check_network(job.model):
        raise JobError(faults, job.name)


def build_model(job: Job, sample_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The network that a job names, its first weights drawn from torch's generator.

    Args:
        job: checked by `check_model`.
        sample_shape: of the source's samples: (H, W, C), (features,), or (0, 0, C) where they are yet to be cropped.
        num_classes: number of classes.

    Raises:
        JobError: the network does not take such samples; or one of the user's own is not what it must be.
    """
    model, shape = job.model, _cropped(job, sample_shape)
    if faults := check_shape(model, shape):
        raise JobError(faults, job.name)
    named = read_name(model.name)
    if named.family == "own":
        return load_own(job, (shape[-1], *shape[:-1]), num_classes)
    family = FAMILIES[named.family]
    given = {key: value for key in family.keys if (value := getattr(model, key)) is not None}
    numbers = dict(zip(family.numbers, named.numbers, strict=True))
    try:
        return fuse_relu(_NETWORKS[named.family](shape[-1], num_classes, **numbers, **given))
    except (RuntimeError, MemoryError) as error:  # larger than memory, or than torch can count
        told = f"{model.name!r} for {num_classes} classes cannot be built: {str(error).partition(chr(10))[0]}"
        raise JobError([Fault("model", told)], job.name) from None


def hazards(job: Job, model: nn.Module, sample_shape: Sequence[int]) -> list[str]:
    """What in a job's network would let the layout decide its results; `layout_hazards`. Our own have none.

    Args:
        job: names the network.
        model: as `build_model` gave it.
        sample_shape: as `build_model` takes it.

    Raises:
        JobError: a forward of the network fails.
    """
    if read_name(job.model.name).family != "own":
        return []
    shape = _cropped(job, sample_shape)
    try:
        return layout_hazards(model, (shape[-1], *shape[:-1]))
    except Exception as error:  # the user's own code
        fault = f"{job.model.name} fails in a trial forward over {NUM_SAMPLES} samples: {describe_error(error)}"
        raise JobError([Fault("model.name", fault)], job.name) from error


def forward_state(job: Job, model: nn.Module, sample_shape: Sequence[int]) -> ForwardState:
    """Find what training passes change in a job's network, by trial passes; our own networks change nothing else.

    Args:
        job: names the network.
        model: as `build_model` returned it; buffers that training changes become part of its `state_dict`.
        sample_shape: as `build_model` takes it.

    Raises:
        JobError: the trial fails; or the job is exact, and the network keeps state outside its buffers.
    """
    shape = _cropped(job, sample_shape)
    own = read_name(job.model.name).family == "own"
    return try_own(job, model, (shape[-1], *shape[:-1])) if own else ForwardState()


def _cropped(job: Job, sample_shape: Sequence[int]) -> tuple[int, ...]:
    """(H, W, C) or (features,), with the sides that the job's crop gives."""
    shape = tuple(sample_shape)
    if len(shape) == 3 and shape[0] == 0 and job.data.image_size:
        return (job.data.image_size, job.data.image_size, shape[2])
    return shape
