"""Check that all ranks hold the same weights, as they must after every update."""

from __future__ import annotations

from collections import Counter

import torch
from crc32c import crc32c
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.messages.wording import listed

_MOST_SHOWN = 8


def check_agreement(
    model: nn.Module, ranks: Ranks, samples: int, consequence: str = "This checkpoint was not written"
) -> None:
    """Compare a CRC-32C of all parameters and buffers over the ranks, in one small all-reduce.

    All ranks call it together.

    Args:
        model: of this rank.
        ranks: that train it together.
        samples: the sample counter, for the message.
        consequence: what is not done if the weights differ, for the message.

    Raises:
        CollectiveError: on all ranks, if the weights differ; the message names the ranks and tensors.
    """
    if ranks.size == 1:
        return
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    checksums = [_checksum(value) for value in tensors.values()]
    if ranks.all_equal(crc32c(repr(checksums).encode()), "weights"):
        return
    table = ranks.all_gather(checksums, "weights by tensor")
    differing = [name for name, column in zip(tensors, table.T.tolist(), strict=True) if len(set(column)) > 1]
    rows = [tuple(row) for row in table.tolist()]
    # Checkpoints hold rank 0's weights, but the weights of most ranks are more likely to be right.
    usual = Counter(rows).most_common(1)[0][0]
    odd = [rank for rank, row in enumerate(rows) if row != usual]
    error = RunError(
        f"after {samples:,} samples the ranks hold different weights: rank {listed(odd, _MOST_SHOWN)} differs from "
        f"rank {rows.index(usual)} in {listed(differing, _MOST_SHOWN)}. {consequence}. The cause may be a network that "
        "changes its weights or buffers in its forward pass; `hvd-batchgrow verify` compares layouts"
    )
    raise CollectiveError(error if ranks.rank == 0 else None, ExitCode.FAILURE)


def _checksum(tensor: Tensor) -> int:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return int(crc32c(values.view(torch.uint8).numpy().data))
