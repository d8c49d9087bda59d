"""Train with Hugging Face Accelerate; the micro-batch grows to 16 samples per process, then accumulation grows.

accelerate launch (or torchrun) train.py [--max-updates N], or python train.py. Run it again to resume.
"""

import argparse
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hvd_batchgrow.library import (
    PlanBatchSampler,
    PlanLR,
    Ranks,
    connect,
    evaluate,
    load_checkpoint,
    plan_updates,
    save_checkpoint,
    split_batches,
)

SEED, LR, BETAS = 1, 0.003, (0.9, 0.999)
GROWTH = {"policy": "grow", "epochs": 3, "global_batch": 16, "boundaries_epochs": [0.7, 1.6], "noise_factor": 3}


def measure(network: nn.Module, batch: list[Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Return the summed loss and the number of correct predictions of a batch, each with its number of samples."""
    rows, classes = (part.to(next(network.parameters()).device) for part in batch)
    logits = network(rows)
    loss, correct = cross_entropy(logits, classes, reduction="sum"), (logits.argmax(1) == classes).sum()
    return {"loss": (loss, len(rows)), "accuracy": (correct, len(rows))}


def train(accelerator: Accelerator, ranks: Ranks, max_updates: int | None) -> None:
    """Train from the checkpoint, if there is one, to the end of the plan or for a number of updates."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)

    # Synthetic rows of four classes.
    inputs = torch.randn(2000, 20)
    targets = (inputs @ torch.randn(20, 4) + torch.randn(2000, 4)).argmax(1)
    train_set, test_set = TensorDataset(inputs[:1500], targets[:1500]), TensorDataset(inputs[1500:], targets[1500:])

    network = nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=BETAS, weight_decay=0.01)  # also of the norm

    num_processes = accelerator.num_processes
    plan = plan_updates(
        GROWTH,
        lr=LR,
        num_samples=1500,
        ghost_batch=8,
        num_ranks=num_processes,
        max_micro_batch=16,
        optim={"name": "adamw", "betas": BETAS, "weight_decay": 0.01},
    )
    sampler = PlanBatchSampler(plan, SEED, accelerator.process_index, num_processes)
    scheduler = PlanLR(optimizer, plan, sampler)
    # Neither the loader nor the scheduler is prepared: the sampler has only the samples of this process, and a prepared
    # scheduler would step once per process.
    loader = DataLoader(train_set, batch_sampler=sampler)
    test_loader = DataLoader(test_set, batch_sampler=split_batches(len(test_set), 64, ranks.rank, ranks.size))
    model, optimizer = accelerator.prepare(network, optimizer)

    saved = load_checkpoint("checkpoint.pt", ranks)
    if saved:
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.set_samples(saved["samples"])

    num_updates = 0
    while scheduler.samples < plan.schedule.end_samples and num_updates != max_updates:
        for update, batches in sampler.by_update(loader):  # an iteration over the sampler is an epoch
            for number, (rows, classes) in enumerate(batches, start=1):
                is_last = number == len(update.micro_batches)
                with nullcontext() if is_last else accelerator.no_sync(model):  # all-reduce once per update
                    loss = cross_entropy(model(rows.to(accelerator.device)), classes.to(accelerator.device))
                    accelerator.backward(loss / len(update.micro_batches))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            num_updates += 1
            if num_updates == max_updates:
                break
        state = {"samples": scheduler.samples, "model": network.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint("checkpoint.pt", state, ranks)
        result = evaluate(network, test_loader, measure, ranks)
        batch = scheduler.phase.global_batch
        accelerator.print(
            f"sample {scheduler.samples}: batch {batch}, loss {result['loss']:.4f}, {result['accuracy']:.3f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-updates", type=int, help="save and stop after this many updates")
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # without cpu=True, each process would train alone
    ranks = connect()  # the processes of Accelerate
    train(accelerator, ranks, arguments.max_updates)
    accelerator.free_memory()
    ranks.close()
    accelerator.end_training()
