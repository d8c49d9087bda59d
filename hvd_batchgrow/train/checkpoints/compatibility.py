"""Check that a checkpoint fits the network and the optimizer that would resume from it.

Its seal proves that it is complete, but a file of another run may have been copied into the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.nn.state.extra_state import is_extra_state
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.update.weight_average import averages_of, lack_statistics, running_statistics

_MOST_SHOWN = 10
_GROUP_STATE = ("params", "lr", "momentum", "betas")
"""Keys of a parameter group that a checkpoint restores. The others are the job's settings, or belong to a version of
torch."""


def check_fits(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Compare names, shapes and types without loading anything.

    Raises:
        RunError: the checkpoint does not fit; the message lists the differences.
    """
    best, best_average = (checkpoint.growth.get(key) for key in ("best", "best_average"))
    misfits = [
        *_model_misfits(checkpoint, model),
        *(_tensor_misfits("growth.best", best, model.state_dict()) if best else ()),
        *(_average_misfits("growth.best_average", best_average, model) if best_average else ()),
        *_optimizer_misfits(checkpoint.optimizer, optimizer),
    ]
    if misfits:
        fault = f"{folder}: the checkpoint at sample {checkpoint.samples:,} does not fit this network and optimizer"
        remedy = "remove it from the folder to resume from the checkpoint before it"
        raise RunError("\n  ".join([f"{fault}:", *_first(misfits), remedy]))


def check_model_fits(checkpoint: Checkpoint, model: nn.Module, folder: Path) -> None:
    """Compare names, shapes and types of weights and averages with those of a network.

    Raises:
        RunError: the checkpoint does not fit; the message lists the differences.
    """
    if misfits := list(_model_misfits(checkpoint, model)):
        fault = f"{folder}: the checkpoint at sample {checkpoint.samples:,} does not fit the run's network"
        raise RunError("\n  ".join([f"{fault}:", *_first(misfits), "has the code of the network changed?"]))


def _model_misfits(checkpoint: Checkpoint, model: nn.Module) -> Iterator[str]:
    yield from _tensor_misfits("model", checkpoint.model, model.state_dict())
    if checkpoint.average:
        yield from _average_misfits("average", checkpoint.average, model)


def _average_misfits(what: str, found: Mapping[str, Tensor], model: nn.Module) -> Iterator[str]:
    wanted = averages_of(model)
    if lack_statistics(found, model):
        wanted = {name: value for name, value in wanted.items() if name not in running_statistics(model)}
    return _tensor_misfits(what, found, wanted)


def average_notes(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """Return a note if the average of a checkpoint lacks running statistics, which a user of the average may see."""
    if not lack_statistics(checkpoint.average, model):
        return []
    what = f"the average in the checkpoint at sample {checkpoint.samples:,} has no running statistics of the norms"
    return [f"{what}, because an earlier version wrote it; those of the weights are used instead"]


def _first(misfits: Sequence[str]) -> list[str]:
    return [*islice(misfits, _MOST_SHOWN), *(["…"] if len(misfits) > _MOST_SHOWN else [])]


def _tensor_misfits(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted({*found, *wanted}):
        sides = [_described(name, side[name]) if name in side else "nothing" for side in (found, wanted)]
        if sides[0] != sides[1]:
            yield f"{what}.{name}: is {sides[0]}, must be {sides[1]}"


def _described(name: str, value: Tensor) -> str:
    if is_extra_state(name):
        return "extra state"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _optimizer_misfits(found: Mapping[str, Any], optimizer: Optimizer) -> Iterator[str]:
    wanted = optimizer.state_dict()["param_groups"]
    groups = found["param_groups"]
    if [len(group.get("params", ())) for group in groups] != [len(group["params"]) for group in wanted]:
        yield "optimizer.param_groups: the sizes of the groups differ"
        return
    for k, (group, own) in enumerate(zip(groups, wanted, strict=True)):
        for key in (key for key in _GROUP_STATE if key in own):
            if not (key in group and _like(group[key], own[key])):
                theirs = type(group[key]).__name__ if key in group else "nothing"
                yield f"optimizer.param_groups.{k}.{key}: is {theirs}, must be {type(own[key]).__name__}"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    yield from _state_misfits(found["state"], [tuple(parameter.shape) for parameter in parameters])


def _like(found: Any, own: Any) -> bool:
    number = (int, float)
    if isinstance(found, Sequence) and isinstance(own, Sequence) and not isinstance(found, str):
        return len(found) == len(own) and all(map(_like, found, own))
    return type(found) is type(own) or (
        isinstance(found, number) and isinstance(own, number) and bool not in {type(found), type(own)}
    )


def _state_misfits(state: Mapping[Any, Any], shapes: Sequence[tuple[int, ...]]) -> Iterator[str]:
    """Yield the state values that do not fit the shape of their parameter."""
    kinds = {frozenset(values) for values in state.values() if isinstance(values, Mapping)}
    if len(kinds) > 1:
        yield "optimizer.state: the keys differ between parameters"
    for index, values in state.items():
        if not isinstance(index, int) or not 0 <= index < len(shapes) or not isinstance(values, Mapping):
            yield f"optimizer.state.{index}: does not belong to any parameter"
            continue
        for key, value in values.items():
            if key == "buffer_lr":  # of Lars
                if not isinstance(value, float):
                    yield f"optimizer.state.{index}.{key}: is {type(value).__name__}, must be float"
                continue
            shape = tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else None
            fitting: tuple[Any, ...] = () if key == "step" else shapes[index]  # Adam counts its updates
            if shape != fitting and not (value is None and key != "step"):
                yield f"optimizer.state.{index}.{key}: is {shape or type(value).__name__}, must be {fitting}"
