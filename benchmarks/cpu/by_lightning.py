"""The contestant that trains by Lightning: python -m benchmarks.cpu.by_lightning PACKAGES SIZE BATCH UPDATES."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants import LR, MOMENTUM, WEIGHT_DECAY
from benchmarks.cpu.bare_loop import augmented
from benchmarks.cpu.cases import MICRO_BATCH, case_of, job_of_case, network_by_hand
from benchmarks.cpu.contestant import wait_for_turn
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.torchvision_shim import repair_torchvision


def main() -> None:
    """Train in turns."""
    packages, size, batch, num_updates = sys.argv[1:]
    sys.path.insert(0, packages)
    repair_torchvision()  # Lightning imports it
    import lightning  # type: ignore[import-not-found]
    from lightning.pytorch.callbacks import GradientAccumulationScheduler  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    case = case_of("small", is_tiny=size == "tiny")
    source = load_source(job_of_case(case, 128).data, 0, lambda *_: None)
    load = augmented(source, case.data["crop_padding"])

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network_by_hand(case)

        def training_step(self, samples: tuple[Tensor, Tensor], _: int) -> Tensor:
            images, labels = samples
            return nn.functional.cross_entropy(self.network(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            values: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "fused": True}
            return torch.optim.SGD(self.parameters(), **values)

    class Turns(lightning.Callback):  # type: ignore[misc]
        end = 1

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == self.end:
                if not wait_for_turn():
                    os._exit(0)
                self.end += int(num_updates)

    loader: Any = torch.utils.data.DataLoader(
        range(len(source.train)),  # type: ignore[arg-type]
        batch_size=MICRO_BATCH, shuffle=True, drop_last=True, collate_fn=lambda ids: load(torch.tensor(ids)),
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[GradientAccumulationScheduler({0: int(batch) // MICRO_BATCH}), Turns()],
    )  # fmt: skip
    trainer.fit(Module(), loader)


if __name__ == "__main__":
    main()
