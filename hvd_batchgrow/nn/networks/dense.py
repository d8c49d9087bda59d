"""Dense networks for tabular data."""

from __future__ import annotations

from torch import Tensor, nn

from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d


class DenseLayers(nn.Module):
    """Linear layers with ghost norm and ReLU between them: seven layers by default.

    The hidden layers have no biases, because the norm's mean would cancel them. Published experiments with
    growing batches on the cover-type table give the number of layers, but not the widths. We chose 512 for all
    six hidden layers: 1 348 103 parameters for 54 features and 7 classes. Initial weights: torch's defaults;
    their scale does not matter, because a norm follows each hidden layer.

    Shapes: input (n, features), output (n, num_classes) logits.

    Args:
        features: length of a row.
        num_classes: number of classes.
        channels: width of each hidden layer.
        ghost_batch: γ of every ghost norm, in samples.
        bn_momentum: weight of one ghost batch in the running statistics.
        dropout: fraction of the values that keyed dropout sets to 0 after each ReLU.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        channels: tuple[int, ...] = (512,) * 6,
        ghost_batch: int = 64,
        bn_momentum: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = features
        for out in channels:
            norm = GhostBatchNorm1d(out, ghost_batch, momentum=bn_momentum)
            layers += [nn.Linear(width, out, bias=False), norm, nn.ReLU(inplace=True)]
            if dropout:
                layers.append(KeyedDropout(dropout))
            width = out
        self.hidden = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of a batch of rows."""
        return self.classifier(self.hidden(rows))  # type: ignore[no-any-return]
