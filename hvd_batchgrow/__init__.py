"""Train with Horovod so that the batch grows where others decay the learning rate."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvd_batchgrow.library import *  # noqa: F403

__version__ = "1.0.0"

__all__ = ["ArrayDataset", "Classification", "CollectiveError", "Dataset", "Datasets", "GhostBatchNorm1d",
    "GhostBatchNorm2d", "JobError", "KeyedDropout", "Lars", "Losses", "MicroBatch", "NonFinite", "NormGradients",
    "Phase", "Plan", "PlanBatchSampler", "PlanLR", "PlannedMicroBatch", "Ranks", "RunError", "Schedule", "SingleRank",
    "Stream", "Task", "Update", "UpdateEngine", "UpdateResult", "UpdateSection", "choose_device", "connect",
    "convert_dropout", "convert_ghost_batch_norm", "evaluate", "find_forward_state", "forward_of", "layout_hazards",
    "load_checkpoint", "plan_updates", "save_checkpoint", "split_batches", "updates"]  # fmt: skip
"""The public names. They need torch, which is imported when the first of them is used."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("hvd_batchgrow.library"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
