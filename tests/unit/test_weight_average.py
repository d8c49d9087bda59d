"""The moving average of the weights, and of the running statistics that belong to them."""

from __future__ import annotations

from dataclasses import replace
from math import exp, sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.deployment.trained_network import load_network
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.nn.state.forward_state import restored_buffers
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.update.weight_average import WeightAverage
from tests.helpers import small_job
from tests.trained_runs import RUN
from tests.training import Recorder, bytes_of, make_trainer, newest, train

EARLIER = "has no running statistics of the norms, because an earlier version wrote it"


def test_running_statistics_are_averaged_like_the_weights() -> None:
    """A weight w = 1, 2, 3 and 4, and the samples 1, 2, 4 and 5: the activations have mean 3 w and variance 10/3 w²."""
    linear, norm = nn.Linear(1, 1, bias=False), GhostBatchNorm1d(1, 4, momentum=0.25)
    assert norm.weight is not None
    assert norm.bias is not None
    norm.weight.requires_grad = norm.bias.requires_grad = False
    network = nn.Sequential(linear, norm).double()
    network.register_buffer("calls", torch.zeros(1))
    average, samples = WeightAverage(network, 10.0), torch.tensor([[1.0], [2.0], [4.0], [5.0]]).double()
    running = {"mean": 0.0, "var": 1.0}
    expected: dict[str, float] = {}
    for weight in (1.0, 2.0, 3.0, 4.0):
        linear.weight.data.fill_(weight)
        network(samples)
        network.get_buffer("calls").add_(1)
        average.update(4)
        of_batch = {"mean": 3 * weight, "var": 10 / 3 * weight**2}
        running = {name: 0.75 * value + 0.25 * of_batch[name] for name, value in running.items()}
        now, d = {"weight": weight, **running}, exp(-4 / 10)
        expected = {name: d * expected[name] + (1 - d) * value for name, value in now.items()} if expected else now
    network.eval()
    with average.in_place():
        found = linear.weight.item(), norm.running_mean.item(), norm.running_var.item()
        assert found == pytest.approx((expected["weight"], expected["mean"], expected["var"]), rel=1e-12)
        output = (expected["weight"] * 5 - expected["mean"]) / sqrt(expected["var"] + 1e-5)
        assert network(samples)[3].item() == pytest.approx(output, rel=1e-12)
        assert network.get_buffer("calls").item() == 4.0
    found = linear.weight.item(), norm.running_mean.item(), norm.running_var.item()
    assert found == pytest.approx((4.0, running["mean"], running["var"]), rel=1e-12)


def test_statistics_that_an_evaluation_replaces_are_restored_too() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2))
    average = WeightAverage(network, 100.0)
    average.update(1)
    network.get_buffer("0.running_mean").fill_(3.0)
    with average.in_place(), restored_buffers(network, ["0.running_mean"]):
        assert network.get_buffer("0.running_mean").tolist() == [0.0, 0.0]
    assert network.get_buffer("0.running_mean").tolist() == [3.0, 3.0]


def without_statistics(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint as a version wrote it that averaged the parameters only."""
    return replace(checkpoint, average={k: v for k, v in checkpoint.average.items() if "running_" not in k})


def test_a_resumed_run_has_the_averaged_statistics_of_an_undisturbed_one(tmp_path: Path) -> None:
    job, ranks = small_job(update={"ema_samples": 150.0}), SingleRank()
    whole, _ = train(job, ranks, tmp_path / "whole")
    first = min((tmp_path / "whole/checkpoints").glob("*.pt")).read_bytes()
    resumed, _ = train(job, ranks, tmp_path / "resumed", checkpoint=Checkpoint.from_bytes(first))
    assert whole.state.average is not None
    assert resumed.state.average is not None
    found, expected = resumed.state.average.state_dict(), whole.state.average.state_dict()
    assert any(name.endswith("running_var") for name in expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_average_without_statistics_continues_from_those_of_the_weights(tmp_path: Path) -> None:
    job, ranks, recorder = small_job(update={"ema_samples": 150.0}), SingleRank(), Recorder()
    train(job, ranks, tmp_path / "whole")
    first = Checkpoint.from_bytes(min((tmp_path / "whole/checkpoints").glob("*.pt")).read_bytes())
    earlier = without_statistics(first)
    trainer = make_trainer(job, ranks, tmp_path / "resumed")
    trainer.state.begin(earlier, ranks)
    assert trainer.state.average is not None
    for name, value in trainer.state.average.state_dict().items():
        assert torch.equal(value, (first.model if "running_" in name else first.average)[name])
    train(job, ranks, tmp_path / "resumed", recorder, checkpoint=earlier)
    assert any(EARLIER in note for note in recorder.notes)
    last = newest(ranks, tmp_path / "resumed")
    assert last is not None
    assert last.average.keys() == first.average.keys()


def test_predict_and_evaluate_use_the_averaged_statistics(
    photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = max(RUN.glob("checkpoints/*.pt"))
    checkpoint = Checkpoint.from_bytes(path.read_bytes())
    found = load_network(RUN, device="cpu", average=True)
    assert not found.notes
    state = found.model.state_dict()
    names = [name for name in state if "running_" in name]
    assert names
    for name, value in state.items():
        torch.testing.assert_close(value, checkpoint.average[name], rtol=0, atol=0)
    assert any(not torch.equal(state[name], checkpoint.model[name]) for name in names)
    assert main(["evaluate", str(RUN)]) == 0
    assert EARLIER not in capsys.readouterr().err
    path.write_bytes(bytes_of(without_statistics(checkpoint)))
    for command in (["evaluate", str(RUN)], ["predict", str(RUN), str(photos[0]), "--average"]):
        assert main(command) == 0
        assert EARLIER in " ".join(capsys.readouterr().err.split())
    state = load_network(RUN, device="cpu", average=True).model.state_dict()
    assert all(torch.equal(state[name], checkpoint.model[name]) for name in names)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, num_classes))
        self.head[2].weight = self.head[1].weight

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(images.flatten(1))
        return found


def test_a_shared_weight_is_the_averaged_one_in_both_places(photos: list[Path]) -> None:
    """The defect: the weight itself, which the checkpoint holds under the second name, replaced the average."""
    text = Path("small.toml").read_text().replace("small_conv_net", f"{__name__}:Tied")
    Path("small.toml").write_text(text.replace("channels = [\n    4,\n    8,\n]\n", ""))
    assert main(["train", "small.toml", "--overwrite", "--update.ema-samples", "40"]) == 0
    checkpoint = Checkpoint.from_bytes(max(RUN.glob("checkpoints/*.pt")).read_bytes())
    state = load_network(RUN, device="cpu", average=True).model.state_dict()
    expected = checkpoint.average["head.1.weight"]
    assert not torch.equal(expected, checkpoint.model["head.1.weight"])
    assert torch.equal(state["head.1.weight"], expected)
    assert torch.equal(state["head.2.weight"], expected)
