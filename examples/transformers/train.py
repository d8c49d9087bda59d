"""Train with the Trainer of Hugging Face transformers; each process splits its share of a batch into micro-batches.

torchrun --standalone --nproc-per-node 2 train.py [--max-updates N], or python train.py. Run it again to resume.
"""

import argparse
import gc
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hvd_batchgrow.library import PlanBatchSampler, PlanLR, plan_updates

SEED, LR, BETAS, MICRO_BATCH = 1, 0.003, (0.9, 0.999), 16
GROWTH = {"policy": "grow", "epochs": 3, "global_batch": 16, "boundaries_epochs": [0.7, 1.6], "noise_factor": 3}
FOLDER = "checkpoints"


class Rows(Dataset[dict[str, Tensor]]):
    """Synthetic rows of four classes."""

    def __init__(self, num_samples: int) -> None:
        self.inputs = torch.randn(num_samples, 20)
        self.labels = (self.inputs @ torch.randn(20, 4) + torch.randn(num_samples, 4)).argmax(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """A small network for rows, with the interface that Trainer needs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss and the logits."""
        logits = self.network(inputs)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class GrowingTrainer(Trainer):
    """Takes its batches from a batch sampler, and splits them into micro-batches.

    Args:
        sampler: yields this process's whole share of each update.
        arguments: of Trainer.
    """

    def __init__(self, *, sampler: PlanBatchSampler, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.sampler = sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader that Accelerate does not divide again among the processes."""
        return DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Accumulate the gradient of an update, with one all-reduce; return its loss."""
        parts = zip(*(value.split(MICRO_BATCH) for value in inputs.values()), strict=True)
        micro_batches = [dict(zip(inputs, part, strict=True)) for part in parts]
        losses = []
        for number, micro_batch in enumerate(micro_batches, start=1):
            # Trainer divides the mean loss of a micro-batch by this number. The last one may be smaller.
            self.current_gradient_accumulation_steps = len(inputs["labels"]) / len(micro_batch["labels"])
            is_last = number == len(micro_batches)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro_batch))
        return torch.stack(losses).sum()


class StopAfter(TrainerCallback):
    """Saves and stops after a number of updates, and prints when the batch grows."""

    def __init__(self, scheduler: PlanLR, max_updates: int | None) -> None:
        self.scheduler, self.max_updates, self.num_updates = scheduler, max_updates, 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """Count an update."""
        self.num_updates += 1
        if self.num_updates == self.max_updates:
            control.should_save = control.should_training_stop = True
        phase = self.scheduler.phase
        if state.is_world_process_zero and phase.start_samples == self.scheduler.samples:
            print(f"sample {phase.start_samples}: batch {phase.global_batch}")


def train(max_updates: int | None) -> None:
    """Train from the last checkpoint, if there is one, to the end of the plan or for a number of updates."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    dataset, model = Rows(1500), Classifier()
    arguments = TrainingArguments(
        output_dir=FOLDER,
        use_cpu=not torch.cuda.is_available(),  # otherwise, without GPUs, each process would train alone
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
    )
    ranks = arguments.world_size
    # The micro-batch limit is above the largest batch, so an update is one batch of the loader.
    plan = plan_updates(
        GROWTH,
        lr=LR,
        num_samples=1500,
        ghost_batch=8,
        num_ranks=ranks,
        max_micro_batch=1024,
        optim={"name": "adamw", "betas": BETAS, "weight_decay": 0.01},
    )
    arguments.max_steps = plan.num_updates
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.01)
    scheduler = PlanLR(optimizer, plan)  # without the sampler: a resumed Trainer skips batches itself
    trainer = GrowingTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        optimizers=(optimizer, scheduler),
        callbacks=[StopAfter(scheduler, max_updates)],
        sampler=PlanBatchSampler(plan, SEED, arguments.process_index, ranks, span="run"),
    )
    last = get_last_checkpoint(FOLDER) if os.path.isdir(FOLDER) else None
    trainer.train(resume_from_checkpoint=last)
    with torch.no_grad():
        loss = model.cpu()(dataset.inputs, dataset.labels)["loss"]
    if trainer.is_world_process_zero():
        print(f"{trainer.state.global_step} updates: loss {loss:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-updates", type=int, help="save and stop after this many updates")
    train(parser.parse_args().max_updates)
    gc.collect()  # ends the threads of DistributedDataParallel before the process does
    if distributed.is_initialized():
        distributed.destroy_process_group()
