"""A dense network for tabular data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hvd_batchgrow.config import ModelSection
from hvd_batchgrow.config.model_specs import MODELS, NORM_KEYS, ModelSpec
from hvd_batchgrow.messages.errors import Fault

if TYPE_CHECKING:
    from torch import nn


def build(
    features: int,
    num_classes: int,
    *,
    ghost_batch: int,
    bn_momentum: float,
    dropout: float,
    channels: tuple[int, ...] = (512,) * 6,
) -> nn.Module:
    """Return seven linear layers with ghost norm and ReLU between them.

    The hidden layers have no biases, because the norm's mean would cancel them. The network
    is made for the forest cover type (`jobs/covtype_dense7_plateau.toml`): with the default widths, our choice, it has
    1 348 103 parameters for 54 features and 7 classes. Initial weights: torch's defaults; their scale does not matter,
    because a norm follows each hidden layer.

    Shapes: input (n, features), output (n, num_classes) logits.

    Args:
        features: length of a row.
        num_classes: number of classes.
        ghost_batch: γ of every ghost norm, in samples.
        bn_momentum: weight of one ghost batch in the running statistics.
        dropout: fraction of the values that keyed dropout sets to 0 after each ReLU.
        channels: width of each hidden layer.
    """
    from torch import nn

    from hvd_batchgrow.nn.dropout import KeyedDropout
    from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d

    hidden = nn.Sequential()
    width = features
    for out in channels:
        hidden.append(nn.Linear(width, out, bias=False))
        hidden.append(GhostBatchNorm1d(out, ghost_batch, momentum=bn_momentum))
        hidden.append(nn.ReLU(inplace=True))
        if dropout:
            hidden.append(KeyedDropout(dropout))
        width = out
    network = nn.Sequential()
    network.add_module("hidden", hidden)
    network.add_module("classifier", nn.Linear(width, num_classes))
    return network


def _faults(model: ModelSection) -> Iterator[Fault]:
    if model.channels and len(model.channels) != 6:
        widths = f"{len(model.channels)}: {list(model.channels)}"
        yield Fault("model.channels", f"dense7 has six hidden layers, so six widths, not {widths}")


MODELS.register(
    ModelSpec(
        name="dense7",
        doc="seven linear layers with norm and ReLU between them, for rows",
        keys=NORM_KEYS | {"channels", "dropout"},
        accepts="rows",
        build=build,
        faults=_faults,
    )
)
