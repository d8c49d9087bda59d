"""Train a small convolutional network on the ranks that horovodrun or mpirun has started."""

from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hvd_batchgrow.library import PlanBatchSampler, PlanLR, plan_updates

EPOCHS, SEED, BATCH, LR = 5, 1, 16, 0.01
CHECKPOINT = Path("checkpoint.pt")

hvd.init()
rank, size = hvd.rank(), hvd.size()
torch.manual_seed(SEED)
torch.set_num_threads(1)

# Synthetic images of four classes: noise and the pattern of the class.
patterns = torch.randn(4, 1, 8, 8)
labels = torch.randint(4, (3072,))
images = patterns[labels] + 3 * torch.randn(3072, 1, 8, 8)
train_set, test_set = TensorDataset(images[:2560], labels[:2560]), TensorDataset(images[2560:], labels[2560:])

grow = {"policy": "grow", "epochs": EPOCHS, "global_batch": BATCH, "boundaries_epochs": [2, 4], "noise_factor": 4}
plan = plan_updates(grow, lr=LR, momentum=0.9, num_samples=2560, ghost_batch=8, num_ranks=size, max_micro_batch=256)
sampler = PlanBatchSampler(plan, SEED, rank, size)
loader = DataLoader(train_set, batch_sampler=sampler)

model = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4)
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
scheduler = PlanLR(optimizer, plan, sampler)

first_epoch = 0
if CHECKPOINT.exists():
    saved = torch.load(CHECKPOINT)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    first_epoch = saved["epoch"]
hvd.broadcast_parameters(model.state_dict(), root_rank=0)

for epoch in range(first_epoch, EPOCHS):
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
    if rank == 0:
        with torch.no_grad():
            accuracy = (model(test_set.tensors[0]).argmax(1) == test_set.tensors[1]).float().mean()
        print(f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {accuracy:.3f}", flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save({"epoch": epoch + 1, **state}, CHECKPOINT)
hvd.shutdown()
