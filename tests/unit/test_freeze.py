"""Frozen parameters, and the norms among them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tomli_w
import torch
from torch import Tensor, nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.nn.checks.layout_hazards import layout_hazards
from hvd_batchgrow.nn.freeze import freeze
from hvd_batchgrow.nn.ghost.convert import convert_ghost_batch_norm
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.ghost.running_statistics import reestimate_running_statistics
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch
from tests import golden
from tests.helpers import job_tree, small_job, small_source, write_idx_folder

GROUP = 4


class Net(nn.Module):
    """Three norms: two with parameters, one without; the last path is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.body(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


def make() -> nn.Module:
    torch.manual_seed(0)
    return convert_ghost_batch_norm(Net(), GROUP)


def frozen_norms(model: nn.Module) -> list[bool]:
    return [norm.frozen for norm in ghost_norms(model)]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["stem"], [True, False, False]),
        (["stem.*"], [True, False, False]),
        (["body"], [False, True, False]),
        (["body.0.*"], [False, False, False]),  # the convolution alone
        (["stem.1.weight"], [False, False, False]),  # its bias is still trained
        (["stem.1.weight", "*.1.bias"], [True, False, False]),
        (["stem", "body", "last"], [True, True, True]),
    ],
)
def test_a_norm_without_a_trained_parameter_stays_in_evaluation(patterns: list[str], expected: list[bool]) -> None:
    model = make()
    assert freeze(model, patterns) == []
    assert frozen_norms(model) == expected
    for mode in (True, False, True):
        model.train(mode)
        assert [not norm.training for norm in ghost_norms(model)] == [frozen or not mode for frozen in expected]
    assert frozen_norms(copy.deepcopy(model).train()) == expected


def test_a_network_that_froze_a_norm_itself_keeps_its_mode() -> None:
    model = make()
    model.stem.requires_grad_(False)
    assert freeze(model, ["body"]) == []
    assert frozen_norms(model) == [False, True, False]


def test_norms_of_torch_with_running_statistics_stay_in_evaluation() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Flatten())
    model.append(nn.Linear(9, 2))
    assert freeze(model, ["1"]) == []
    before = copy.deepcopy(model.state_dict())
    copied = copy.deepcopy(model)
    for net in (model, copied):
        net.train()(torch.randn(5, 2, 3))
        assert [module.training for module in net] == [True, False, True, True]
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_reestimation_leaves_frozen_norms_and_computes_the_others_with_them() -> None:
    model = make()
    freeze(model, ["stem", "body"])
    with torch.no_grad():
        for norm in ghost_norms(model):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(model)
    batches = [torch.randn(2 * GROUP, 1, 9, 9) for _ in range(3)]
    reestimate_running_statistics(model, batches)
    after, first = model.state_dict(), before.state_dict()
    kept = [name for name in first if "running" in name and torch.equal(after[name], first[name])]
    assert kept == [f"{part}.1.running_{what}" for part in ("stem", "body") for what in ("mean", "var")]
    inputs = [before.eval().last[0](before.body(before.stem(batch))) for batch in batches]  # type: ignore[index, operator]
    means = torch.stack([x.mean((0, 2, 3)) for batch in inputs for x in batch.split(GROUP)])
    torch.testing.assert_close(after["last.1.running_mean"], means.mean(0))


def test_frozen_norms_mix_no_samples() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))
    freeze(model, ["1"])
    assert layout_hazards(model, (2, 3)) == []  # a BatchNorm1d in training mode would be one


def test_updates_are_those_of_a_plain_loop_with_the_same_norms_in_evaluation() -> None:
    model = golden.make_model()
    assert freeze(model, ["features.0", "features.1"]) == []
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert names == ["features.0.weight", "features.1.weight", "features.1.bias"]
    expected = golden._with_batch_norm(model)
    features = expected.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    trained = [p for name, p in expected.named_parameters() if name not in names]
    optimizer = torch.optim.SGD(trained, lr=golden.LR, momentum=golden.MOMENTUM)
    engine = UpdateEngine(
        model,
        build_optimizer(model, small_job(optim={"lr": golden.LR, "weight_decay": 0.0}).optim),
        SingleRank(),
    )
    reduced = [p for bucket in engine.buckets.members for p in bucket]
    assert sorted(map(id, reduced)) == sorted(id(p) for name, p in model.named_parameters() if name not in names)
    for update in range(golden.NUM_UPDATES):
        golden.serve(engine, SingleRank(), 3, update)
        expected.train()
        features[1].eval()
        images, labels = golden.samples(update)
        logits = torch.cat([expected(chunk) for chunk in images.split(golden.GROUP)])
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    golden.assert_same_weights(model, expected)


@pytest.mark.parametrize(
    ("patterns", "words", "message"),
    [
        (["feature.*"], [], "model.freeze: 'feature.*' matches no parameter; nearest: features"),
        (["*"], [], "model.freeze: leaves no parameter to train"),
        (
            ["features"],
            ["--model.precise-bn-samples", "32"],
            "model.precise_bn_samples: has no effect: model.freeze freezes all norms",
        ),
    ],
)
def test_patterns_that_cannot_be_right_are_errors(
    job: str, capsys: pytest.CaptureFixture[str], patterns: list[str], words: list[str], message: str
) -> None:
    Path(job).write_text(tomli_w.dumps(job_tree("data", model={"freeze": patterns})))
    assert main(["train", job, *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists() or not list(Path("runs").glob("small/*"))


FREEZE = '["features.0", "features.1"]'


def tensors(run: str, which: int) -> dict[str, Tensor]:
    path = checkpoint_paths(Path("runs", run, "checkpoints"))[which]
    return Checkpoint.from_bytes(path.read_bytes()).model


def test_a_run_counts_frozen_parameters_and_never_changes_them(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.freeze", FREEZE, "--model.precise-bn-samples", "64", "--checkpoint.keep", "9"]
    assert main(["train", job, *words, "--max-updates", "2"]) == 75
    # a convolution of 1 to 4 channels and its norm; then one of 4 to 8, its norm, and a linear layer for 3 classes
    assert f"network: {36 + 8 + 288 + 16 + 27} parameters, {36 + 8} of them frozen" in capsys.readouterr().err
    assert main(["train", job, *words, "--resume", "auto"]) == 0
    assert main(["train", job, *words, "--name", "whole"]) == 0
    first, last, whole = tensors("small", 0), tensors("small", -1), tensors("whole", -1)
    assert all(torch.equal(last[name], whole[name]) for name in whole)
    kept = {name for name in first if torch.equal(first[name], last[name])}
    assert kept == {f"features.{name}" for name in ("0.weight", *_OF_NORM)}
    assert torch.equal(last["features.1.running_mean"], torch.zeros(4))
    assert main(["train", job, "--resume", "auto", *words[2:]]) == 1
    assert "model.freeze: was ['features.0', 'features.1'], is []" in capsys.readouterr().err
    assert main(["train", job, "--fork", "other", *words[2:]]) == 1


_OF_NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")


@pytest.mark.slow
@pytest.mark.parametrize("exact", ["false", "true"])
def test_verify_passes_with_frozen_parameters(job: str, capsys: pytest.CaptureFixture[str], exact: str) -> None:
    layouts = "1x2x8" if exact == "true" else "1x2x8,1x1x16"
    words = ["--model.freeze", FREEZE, "--layout.exact", exact]
    assert main(["verify", job, "--layouts", layouts, *words]) == 0, capsys.readouterr()


def test_noise_by_layer_group_is_measured_without_frozen_groups(tmp_path: Path) -> None:
    root = write_idx_folder(tmp_path / "data", small_source())
    tree = job_tree(root, model={"freeze": ["features"]}, gradient_noise={"measure": True, "per_layer_group": True})
    (tmp_path / "noise.toml").write_text(tomli_w.dumps(tree))
    words = ["--runs-dir", str(tmp_path / "runs"), "--max-updates", "12", "--layout.max-micro-batch", "8"]
    assert main(["train", str(tmp_path / "noise.toml"), *words]) == 75
    assert (tmp_path / "runs/small/metrics.jsonl").read_text().count("features") == 0


def test_a_frozen_input_layer_gets_no_gradient() -> None:
    model = make()
    freeze(model, ["stem"])
    batch = MicroBatch(torch.randn(GROUP, 1, 9, 9), torch.zeros(GROUP, dtype=torch.int64), (0,))
    model.train()(batch.inputs).sum().backward()
    assert all((p.grad is None) == name.startswith("stem") for name, p in model.named_parameters())


def unnormalized(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def test_precise_statistics_need_a_batch_norm(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"name": f"{__name__}:unnormalized", "channels": None, "precise_bn_samples": 32}
    tree = job_tree("data", model=network)
    del tree["model"]["channels"]
    Path(job).write_text(tomli_w.dumps(tree))
    assert main(["train", job]) == 2
    fault = f"model.precise_bn_samples: has no effect: {__name__}:unnormalized has no batch norm"
    assert fault in capsys.readouterr().err
