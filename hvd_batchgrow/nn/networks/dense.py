"""Dense networks for rows of a table."""

from __future__ import annotations

from torch import Tensor, nn

from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d


class DenseLayers(nn.Module):
    """Linear layers with ghost norm and ReLU between them: seven, with the six hidden widths of the default.

    The hidden layers have no biases: the norm's mean would cancel them. The demonstrations
    of a growing batch on the cover-type table tell the number of layers, not the widths: six times
    512 is ours, 1 348 103 parameters for its 54 features and 7 classes. First weights: torch's defaults;
    the norm after each layer makes their scale of no account.

    Shapes: input (n, features), output (n, num_classes) logits.

    Args:
        features: length of a row.
        num_classes: number of classes.
        channels: width of each hidden layer.
        ghost_batch: γ of every ghost norm, in samples.
        bn_momentum: weight of one ghost batch in the running statistics.
        dropout: share of the values that are dropped after each ReLU, by sample id.
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
        """Logits of a batch of rows."""
        return self.classifier(self.hidden(rows))  # type: ignore[no-any-return]
