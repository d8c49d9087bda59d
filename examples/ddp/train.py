"""Train with torch's DistributedDataParallel; the batch grows by accumulation of equal micro-batches.

torchrun --standalone --nproc-per-node 2 train.py [--max-updates N], or python train.py. Run it again to resume.
"""

import argparse
from contextlib import nullcontext

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from hvd_batchgrow.library import (
    PlanBatchSampler,
    PlanLR,
    Ranks,
    choose_device,
    connect,
    evaluate,
    load_checkpoint,
    plan_updates,
    save_checkpoint,
    split_batches,
)

SEED, LR, MOMENTUM = 1, 0.03, 0.9
GROWTH = {
    "policy": "grow",
    "epochs": 4.0,
    "global_batch": 16,
    "max_batch": 96,
    "boundaries_epochs": [1.0, 1.5, 3.0],
    "noise_factor": 3.0,
    "warmup_epochs": 0.5,
}


def measure(network: nn.Module, batch: list[Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Return the summed loss and the number of correct predictions of a batch, each with its number of samples."""
    rows, classes = (part.to(next(network.parameters()).device) for part in batch)
    logits = network(rows)
    loss, correct = cross_entropy(logits, classes, reduction="sum"), (logits.argmax(1) == classes).sum()
    return {"loss": (loss, len(rows)), "accuracy": (correct, len(rows))}


def train(ranks: Ranks, max_updates: int | None) -> None:
    """Train from the checkpoint, if there is one, to the end of the plan or for a number of updates."""
    device = choose_device(ranks)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)

    # Synthetic rows of four classes.
    inputs = torch.randn(1500, 20)
    targets = (inputs @ torch.randn(20, 4) + torch.randn(1500, 4)).argmax(1)
    train_set, test_set = TensorDataset(inputs[:1000], targets[:1000]), TensorDataset(inputs[1000:], targets[1000:])

    # PlanLR does not change the weight decay of the groups: here norms and biases are not decayed.
    network = nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4)).to(device)
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 1e-3},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    model = DistributedDataParallel(network) if ranks.size > 1 else network

    plan = plan_updates(
        GROWTH,
        lr=LR,
        momentum=MOMENTUM,
        num_samples=len(train_set),
        ghost_batch=8,
        num_ranks=ranks.size,
        max_micro_batch=8,
    )
    sampler = PlanBatchSampler(plan, SEED, ranks.rank, ranks.size)
    scheduler = PlanLR(optimizer, plan, sampler)
    loader = DataLoader(train_set, batch_sampler=sampler)
    test_loader = DataLoader(test_set, batch_sampler=split_batches(len(test_set), 64, ranks.rank, ranks.size))

    saved = load_checkpoint("checkpoint.pt", ranks)
    if saved:
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.set_samples(saved["samples"])

    num_updates = 0
    while scheduler.samples < plan.schedule.end_samples and num_updates != max_updates:
        for update, batches in sampler.by_update(loader):  # an iteration over the sampler is an epoch
            optimizer.zero_grad()
            for number, (rows, classes) in enumerate(batches, start=1):
                is_last = number == len(update.micro_batches)
                with nullcontext() if is_last or ranks.size == 1 else model.no_sync():  # all-reduce once per update
                    loss = cross_entropy(model(rows.to(device)), classes.to(device))
                    (loss / len(update.micro_batches)).backward()
            optimizer.step()
            scheduler.step()
            num_updates += 1
            if num_updates == max_updates:
                break
        state = {"samples": scheduler.samples, "model": network.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint("checkpoint.pt", state, ranks)
        result = evaluate(network, test_loader, measure, ranks)
        if ranks.rank == 0:
            batch = scheduler.phase.global_batch
            print(f"sample {scheduler.samples}: batch {batch}, loss {result['loss']:.4f}, {result['accuracy']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-updates", type=int, help="save and stop after this many updates")
    arguments = parser.parse_args()
    if distributed.is_torchelastic_launched():
        distributed.init_process_group()
    ranks = connect()  # the ranks of torch.distributed, or a single one
    train(ranks, arguments.max_updates)
    ranks.close()
    if distributed.is_initialized():
        distributed.destroy_process_group()
