"""Train with Lightning; the batch grows by larger micro-batches or by accumulating more of them.

torchrun --standalone --nproc-per-node 2 train.py batch|accumulation [--max-updates N], or python train.py ….
Run it again to resume.
"""

import argparse
import gc
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hvd_batchgrow.library import Plan, PlanBatchSampler, PlanLR, plan_updates

SEED, LR, MOMENTUM = 1, 0.03, 0.9
GROWTH = {"policy": "grow", "epochs": 3, "global_batch": 16, "boundaries_epochs": [0.7, 1.6], "noise_factor": 3}
CHECKPOINT = Path("checkpoint.ckpt")


class GrowBatch(pl.Callback):
    """Sets the number of accumulated micro-batches.

    Lightning can change it only between its epochs, so an epoch of Lightning is a span of the sampler with one batch.
    """

    def __init__(self, sampler: PlanBatchSampler) -> None:
        self.sampler = sampler

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set it for this epoch."""
        trainer.accumulate_grad_batches = self.sampler.accumulation


class Classifier(pl.LightningModule):
    """A small network for rows."""

    def __init__(self, plan: Plan, sampler: PlanBatchSampler) -> None:
        super().__init__()
        self.plan, self.sampler = plan, sampler
        self.network = nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """Return the mean loss of a micro-batch."""
        rows, classes = batch
        return cross_entropy(self.network(rows), classes)

    def configure_optimizers(self) -> dict[str, object]:
        """Return the optimizer, with this script's weight decay, and the scheduler, which steps after each update."""
        optimizer = torch.optim.SGD(self.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=1e-3)
        scheduler = PlanLR(optimizer, self.plan, self.sampler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(growth: str, max_updates: int | None) -> None:
    """Train from the checkpoint, if there is one, to the end of the plan or for a number of updates."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    inputs = torch.randn(1500, 20)
    targets = (inputs @ torch.randn(20, 4) + torch.randn(1500, 4)).argmax(1)
    train_set = TensorDataset(inputs, targets)

    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))  # torchrun's
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    plan = plan_updates(
        GROWTH,
        lr=LR,
        momentum=MOMENTUM,
        num_samples=len(train_set),
        ghost_batch=8,
        num_ranks=ranks,
        max_micro_batch=256 if growth == "batch" else 8,
    )
    sampler = PlanBatchSampler(plan, SEED, rank, ranks, span="phase")
    trainer = pl.Trainer(
        devices=ranks_per_node,
        num_nodes=ranks // ranks_per_node,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=-1,  # max_steps decides
        max_steps=plan.num_updates if max_updates is None else max_updates,
        callbacks=[GrowBatch(sampler)],
        use_distributed_sampler=False,  # the batch sampler has only the samples of this process
        reload_dataloaders_every_n_epochs=1,  # the spans of the sampler have different lengths
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier(plan, sampler)
    loader = DataLoader(train_set, batch_sampler=sampler)
    trainer.fit(model, loader, ckpt_path=CHECKPOINT if CHECKPOINT.exists() else None)
    trainer.save_checkpoint(CHECKPOINT)
    with torch.no_grad():
        loss = cross_entropy(model.network.cpu()(inputs), targets)
    if trainer.is_global_zero:
        print(f"{trainer.global_step} updates, {sampler.samples} samples: loss {loss:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("growth", choices=["batch", "accumulation"])
    parser.add_argument("--max-updates", type=int, help="save and stop at this many updates")
    arguments = parser.parse_args()
    train(arguments.growth, arguments.max_updates)
    gc.collect()  # ends the threads of DistributedDataParallel before the process does
    if distributed.is_initialized():
        distributed.destroy_process_group()
