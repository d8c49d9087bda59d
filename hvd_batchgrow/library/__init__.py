"""The public API for a custom training loop, described in docs/library.md."""

from __future__ import annotations

from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.ranks import CollectiveError, Ranks, SingleRank
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Dataset, Datasets
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.library.checkpoints import load_checkpoint, save_checkpoint
from hvd_batchgrow.library.device import choose_device
from hvd_batchgrow.library.evaluation import evaluate, split_batches
from hvd_batchgrow.library.plan_batch_sampler import PlanBatchSampler
from hvd_batchgrow.library.plan_lr import PlanLR
from hvd_batchgrow.library.updates import PlannedMicroBatch, Update, plan_updates, updates
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.nn.checks.layout_hazards import layout_hazards
from hvd_batchgrow.nn.dropout import KeyedDropout, convert_dropout
from hvd_batchgrow.nn.ghost.convert import convert_ghost_batch_norm
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d
from hvd_batchgrow.nn.norm_gradients import NormGradients
from hvd_batchgrow.nn.state.forward_state import find_forward_state
from hvd_batchgrow.optim.lars import Lars
from hvd_batchgrow.schedule.phases import Phase, Schedule
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.tasks.classification import Classification
from hvd_batchgrow.tasks.task import Losses, Task
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.forward import MicroBatch, forward_of
from hvd_batchgrow.train.update.non_finite import NonFinite

__all__ = ["ArrayDataset", "Classification", "CollectiveError", "Dataset", "Datasets", "GhostBatchNorm1d",
    "GhostBatchNorm2d", "JobError", "KeyedDropout", "Lars", "Losses", "MicroBatch", "NonFinite", "NormGradients",
    "Phase", "Plan", "PlanBatchSampler", "PlanLR", "PlannedMicroBatch", "Ranks", "RunError", "Schedule", "SingleRank",
    "Stream", "Task", "Update", "UpdateEngine", "UpdateResult", "UpdateSection", "choose_device", "connect",
    "convert_dropout", "convert_ghost_batch_norm", "evaluate", "find_forward_state", "forward_of", "layout_hazards",
    "load_checkpoint", "plan_updates", "save_checkpoint", "split_batches", "updates"]  # fmt: skip
