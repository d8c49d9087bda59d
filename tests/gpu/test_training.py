"""Compare updates and a whole run on a GPU with those on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.optim.lars import Lars
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.train.trainer import Trainer
from tests import training
from tests.helpers import small_job
from tests.training import Recorder, digest

pytestmark = pytest.mark.usefixtures("float32_convolutions")


def train(folder: Path, **sections: Any) -> tuple[Trainer, list[float]]:
    job, recorder = small_job(**{"data": {"pipeline": "torch"}, **sections}), Recorder()
    trainer, ended = training.train(job, SingleRank(), folder, recorder)
    assert ended.done
    return trainer, [record.loss for record in recorder.records]


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in trainer.parts.model.state_dict().items()}


def test_a_run_is_the_cpus_up_to_rounding(gpu: torch.device, tmp_path: Path) -> None:
    trainer, losses = train(tmp_path / "gpu")
    assert trainer.parts.device == gpu
    on_cpu, expected = train(tmp_path / "cpu", layout={"device": "cpu"})
    assert on_cpu.parts.device.type == "cpu"
    assert losses[0] == pytest.approx(expected[0], rel=1e-4)
    assert losses == pytest.approx(expected, rel=1e-2)
    # 80 steps of 0.05 on gradients of order 1: rounding grows with each step.
    torch.testing.assert_close(state(trainer), state(on_cpu), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("micro_batch", [8, 16])
def test_a_repeated_run_is_bit_identical(gpu: torch.device, tmp_path: Path, micro_batch: int) -> None:
    first, again = (train(tmp_path / name, layout={"max_micro_batch": micro_batch})[0] for name in ("first", "again"))
    assert first.parts.device == gpu
    assert digest(first) == digest(again)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_16_bit_run_learns_as_well(gpu: torch.device, tmp_path: Path, precision: str) -> None:
    trainer, losses = train(tmp_path / "16", update={"precision": precision})
    _, expected = train(tmp_path / "32")
    assert trainer.parts.device == gpu
    assert losses[-1] == pytest.approx(expected[-1], abs=0.1 * expected[0])
    assert {parameter.dtype for parameter in trainer.parts.model.parameters()} == {torch.float32}
    assert (trainer.parts.engine.loss_scale is not None) == (precision == "float16")
    assert trainer.state.num_skipped < 10


def test_an_overflow_halves_the_loss_scale_and_skips_the_update(gpu: torch.device, tmp_path: Path) -> None:
    def run(scale: float) -> Trainer:
        job = small_job(data={"pipeline": "torch"}, update={"precision": "float16"})
        trainer = training.make_trainer(job, SingleRank(), tmp_path / str(scale))
        assert trainer.parts.engine.loss_scale is not None
        trainer.parts.engine.loss_scale.value = scale
        assert trainer.run(StopRequest()).done
        return trainer

    trainer = run(2.0**24)
    assert trainer.parts.device == gpu
    assert trainer.parts.engine.loss_scale is not None
    assert trainer.state.num_skipped > 0
    assert trainer.parts.engine.loss_scale.value == 2.0**24 / 2**trainer.state.num_skipped
    assert all(value.isfinite().all() for value in state(trainer).values())
    assert run(2.0**10).state.num_skipped == 0


def test_lars_is_the_cpus_up_to_rounding(gpu: torch.device) -> None:
    def run(device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((64, 3, 7, 7), (64,), (128, 64), (128,), ())
        parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
        optimizer = Lars(parameters, 0.5, 0.9, 1e-4)
        for lr in (0.5, 0.1, 0.1):
            optimizer.param_groups[0]["lr"] = lr
            for parameter in parameters:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.grad = 0.3 * parameter.detach() + noise.to(device)
            optimizer.step()
        return [tensor.detach().cpu() for tensor in (*parameters, optimizer.trust_ratios())]

    torch.testing.assert_close(run(gpu), run(torch.device("cpu")), rtol=1e-5, atol=1e-6)
