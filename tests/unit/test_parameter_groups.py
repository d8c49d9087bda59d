"""Parameter groups: which parameters they hold, and what an optimizer does with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.optim.build import build_optimizer, lr_ratios, set_hyperparameters
from hvd_batchgrow.optim.groups import layer_indices, overlaps, parameter_groups
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.torchvision_shim import import_torchvision
from tests.helpers import job_tree, small_job

PHASE = Phase(0.0, 0.1, 0.9, 16, 16, start_samples=0, num_updates=10)
BACKBONE = {"match": "backbone.*", "lr_scale": 0.25, "weight_decay": 0.5}
HEAD = {"match": "head", "lr_scale": 1.0, "weight_decay": 0.25}


class Net(nn.Module):
    """A backbone and a head, with biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)


def job_of(**optim: Any) -> Job:
    return small_job(optim=optim)


def make(**optim: Any) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net().double()
    return model, build_optimizer(model, job_of(**optim).optim)


def gradients(model: nn.Module, update: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(update)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()
    }


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float]) -> dict[str, Tensor]:
    """The weights after an update at each learning rate of a schedule."""
    for update, lr in enumerate(rates):
        for name, gradient in gradients(model, update).items():
            model.get_parameter(name).grad = gradient
        set_hyperparameters(optimizer, replace(PHASE, lr=lr, momentum=0.8), lr_ratios(optimizer))
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def rule_of(name: str, weight: Tensor) -> tuple[float, float]:
    """Factor of the learning rate, and weight decay, of a parameter under `BACKBONE`; 0.25 elsewhere."""
    scale, decay = (0.25, 0.5) if name.startswith("backbone") else (1.0, 0.25)
    return scale, decay if weight.ndim > 1 else 0.0


def by_torch(name: str, rates: list[float]) -> dict[str, Tensor]:
    """The same in a plain loop, with one group of torch's optimizer for each parameter."""
    torch.manual_seed(0)
    model = Net().double()
    rules = {key: rule_of(key, p) for key, p in model.named_parameters()}
    groups = [{"params": [p], "weight_decay": rules[key][1]} for key, p in model.named_parameters()]
    made: torch.optim.Optimizer
    if name == "sgd":
        made = torch.optim.SGD(groups, lr=1.0, momentum=0.8)
    else:
        made = (torch.optim.Adam if name == "adam" else torch.optim.AdamW)(groups, lr=1.0, betas=(0.8, 0.999))
    for update, lr in enumerate(rates):
        for group, (scale, _) in zip(made.param_groups, rules.values(), strict=True):
            group["lr"] = lr * scale
        for key, gradient in gradients(model, update).items():
            model.get_parameter(key).grad = gradient
        made.step()
    return {key: p.detach() for key, p in model.named_parameters()}


def by_the_formula_of_lars(rates: list[float]) -> dict[str, Tensor]:
    """v = m v + ε λ (g + β w), w -= v, where ε is each group's and a change of ε scales v."""
    torch.manual_seed(0)
    model = Net().double()
    velocity: dict[str, Tensor] = {}
    for update, lr in enumerate(rates):
        grads = gradients(model, update)
        for name, p in model.named_parameters():
            scale, decay = rule_of(name, p)
            weight, gradient = p.detach(), grads[name]
            trust = 0.001 * weight.norm() / (gradient.norm() + decay * weight.norm()) if p.ndim > 1 else 1.0
            before = velocity.get(name, torch.zeros_like(weight)) * (lr / rates[update - 1] if update else 1.0)
            velocity[name] = 0.8 * before + lr * scale * trust * (gradient + decay * weight)
            weight -= velocity[name]
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("groups", [[BACKBONE], [BACKBONE, HEAD], [HEAD, BACKBONE]], ids=str)
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_weights_are_those_of_a_plain_loop_whichever_group_is_first(name: str, groups: list[dict[str, Any]]) -> None:
    rates = [0.01, 0.04, 0.02]
    model, optimizer = make(name=name, lr=0.3, weight_decay=0.25, groups=groups)
    expected = by_the_formula_of_lars(rates) if name == "lars" else by_torch(name, rates)
    found = trained(model, optimizer, rates)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-12, atol=1e-14, msg=key)


def test_the_schedule_gives_the_base_rate_and_not_the_first_groups() -> None:
    _, optimizer = make(lr=0.3, groups=[{"match": "*", "lr_scale": 0.5}])
    assert {group["lr"] for group in optimizer.param_groups} == {0.15}
    set_hyperparameters(optimizer, replace(PHASE, lr=0.2), lr_ratios(optimizer))
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_without_groups_the_optimizer_is_as_it_was() -> None:
    _, optimizer = make(name="sgd", weight_decay=0.25)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).param_groups[0]
    assert [group.keys() - plain.keys() for group in optimizer.param_groups] == [set(), set()]
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(3, 0.25), (5, 0.0)]


def names(model: nn.Module, groups: list[dict[str, Any]], **optim: Any) -> list[set[str]]:
    known = {p: name for name, p in model.named_parameters()}
    found = parameter_groups(model, job_of(groups=groups, **optim).optim)
    return [{known[p] for p in group.parameters} for group in found]


def test_a_pattern_matches_parameters_or_modules_and_the_first_that_matches_applies() -> None:
    # The first entry changes nothing, but exempts the biases of the backbone from the second.
    groups: list[dict[str, Any]] = [
        {"match": "*.bias"},
        {"match": "backbone", "lr_scale": 2.0},
        {"match": "head.w??ght", "weight_decay": 0.0},
    ]
    assert names(Net(), groups) == [
        {"backbone.0.bias", "backbone.1.bias", "backbone.2.bias", "head.bias"},
        {"backbone.0.weight", "backbone.1.weight", "backbone.2.weight"},
        {"head.weight"},
    ]
    assert overlaps(Net(), job_of(groups=groups).optim) == [
        "optim.groups: 3 tensors match both '*.bias' and 'backbone': the first applies"
    ]


def test_a_tied_parameter_has_all_its_names() -> None:
    net = Net()
    net.head.weight = net.backbone[2].weight  # type: ignore[assignment]
    assert names(net, [{"match": "head.weight", "lr_scale": 2.0}])[0] == {"backbone.2.weight"}


def test_weight_decay_of_norms_and_biases_follows_the_job_unless_the_group_says_otherwise() -> None:
    groups = [{"match": "backbone", "decay_norm_and_bias": True}, {"match": "head", "weight_decay": 0.5}]
    _, optimizer = make(weight_decay=0.25, groups=groups)
    found = [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(2, 0.25), (4, 0.25), (1, 0.5), (1, 0.0)]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "bakbone.*"}], "optim.groups.0.match: 'bakbone.*' matches no parameter; nearest: backbone"),
        ([{"match": "Zzz*"}], "optim.groups.0.match: 'Zzz*' matches no parameter; the network consists of backbone, h"),
        (
            [{"match": "*"}, {"match": "head.*"}],
            "optim.groups.1.match: 'head.*' matches only parameters that earlier p",
        ),
        (
            [{"match": "head"}, BACKBONE],
            "optim.groups.0: 'head' has no effect: set lr_scale, weight_decay or decay_norm_and_bias, or remove it",
        ),
        ([{"match": "head", "lr_scale": 1.0}], "optim.groups.0: 'head' has no effect"),
        ([{"match": "frozen"}], "'frozen' matches only frozen parameters, which are not trained"),
    ],
)
def test_a_pattern_without_effect_is_an_error(groups: list[dict[str, Any]], message: str) -> None:
    net = Net()
    net.frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(JobError) as caught:
        parameter_groups(net, job_of(groups=groups).optim)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"match": "a", "lr_scal": 0.1}, "optim.groups.0.lr_scal: unknown key; did you mean lr_scale?"),
        ({"match": "a", "lr_scale": 0.0}, "optim.groups.0.lr_scale: must be greater than 0, got 0.0"),
        ({"lr_scale": 0.1}, "optim.groups.0.match: is required"),
        ({"match": "a", "weight_decay": -1.0}, "optim.groups.0.weight_decay: must be at least 0"),
    ],
)
def test_a_wrong_key_of_a_group_is_named(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(job_tree(optim={"groups": [entry]}))
    assert message in str(caught.value)


def beit_layer(name: str, num_blocks: int) -> int:
    """`get_num_layer_for_vit` of BEiT's optim_factory.py, with the last layer for all that follows the blocks."""
    if name in {"cls_token", "mask_token", "pos_embed"} or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else num_blocks + 1


def test_layers_of_a_vision_transformer_are_those_of_beit() -> None:
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=5)
    found = layer_indices([name for name, _ in model.named_parameters()])
    assert found == [beit_layer(name, 3) for name, _ in model.named_parameters()]
    optim = job_of(lr=0.2, layer_decay=0.5, weight_decay=0.05).optim
    rates = {p: group["lr"] for group in build_optimizer(model, optim).param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rates[p] == pytest.approx(0.2 * 0.5 ** (4 - beit_layer(name, 3)), rel=1e-12), name


@pytest.mark.parametrize(
    ("order", "layers"),
    [
        (["conv1.weight", "bn1.weight", "layer1.0.conv.weight", "layer1.1.down.0.weight", "fc.bias"], [0, 0, 1, 2, 3]),
        (["stem.weight", "body.weight", "body.bias", "head.weight"], [0, 1, 1, 2]),
        (["net.body.0.weight", "net.body.0.bias", "net.body.2.weight"], [0, 0, 1]),
        (["stages.0.weight", "between.weight", "blocks.0.weight", "norm.weight", "head.bias"], [0, 0, 1, 2, 2]),
        (["scales.0", "scales.1", "head.weight"], [0, 0, 1]),  # an nn.ParameterList holds no module
    ],
)
def test_layers_follow_the_order_of_the_parameters(order: list[str], layers: list[int]) -> None:
    assert layer_indices(order) == layers


def test_a_scale_and_the_decay_by_layer_are_multiplied() -> None:
    groups = [{"match": "backbone.2", "lr_scale": 3.0}]
    model, optimizer = make(lr=0.1, layer_decay=0.5, groups=groups)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: round(rates[p] / 0.1, 12) for name, p in model.named_parameters() if name.endswith("weight")}
    expected = {"backbone.0.weight": 0.125, "backbone.1.weight": 0.25, "backbone.2.weight": 1.5, "head.weight": 1.0}
    assert found == expected


GROUPS = '[{match = "features.*", lr_scale = 0.5}]'


def test_a_run_shows_its_groups_and_is_resumed_with_the_same_ones_only(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", job, "--optim.groups", GROUPS, "--max-updates", "3"]) == 75
    shown = capsys.readouterr().err
    # two convolutions without bias and two norms of 4 and 8 channels; a linear layer of 8 features and 3 classes
    count = 4 * 9 + 4 * 8 * 9 + 2 * (4 + 8)
    rule = "weight decay 0.001 except for norms and biases"
    assert f"parameters that match features.*: {count} parameters in 6 tensors, lr × 0.5, {rule}" in shown
    assert f"other parameters: 27 parameters in 2 tensors, lr × 1, {rule}" in shown
    for changed in (["--optim.groups", GROUPS.replace("0.5", "0.6")], []):
        assert main(["train", job, "--resume", "auto", *changed]) == 1
        fault = capsys.readouterr().err
        assert "these settings affect the weights and have changed:\n  optim.groups: was" in fault
        assert "--fork" not in fault  # which is refused too
    assert main(["train", job, "--fork", "other"]) == 1
    assert "cannot be forked with a change of\n  optim.groups: was" in capsys.readouterr().err
    assert main(["train", job, "--resume", "auto", "--optim.groups", GROUPS, "--max-updates", "1"]) == 75


def test_a_plan_shows_the_rules(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    groups = (
        '[{match = "features.*", lr_scale = 0.5}, {match = "*.bias", weight_decay = 0.25, decay_norm_and_bias = true}]'
    )
    assert main(["plan", job, "--optim.groups", groups, "--optim.layer-decay", "0.75"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "optim." in line]
    assert lines == 2 * [  # of the job and of its twin
        "optim.groups: features.*: lr × 0.5",
        "optim.groups: *.bias: lr × 1, weight decay 0.25, norms and biases decay too",
        "optim.layer_decay: lr × 0.75 from each layer to the one below it",
    ]


def test_a_wrong_pattern_ends_the_run_before_it_has_a_folder(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--optim.groups", '[{match = "feature.*"}]']) == 2
    assert "small: 1 fault\n  optim.groups.0.match: 'feature.*' matches no parameter; nearest: features" in (
        capsys.readouterr().err
    )
    assert not Path("runs/small").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_verify_compares_with_the_same_groups(
    job: str, capsys: pytest.CaptureFixture[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--optim.groups", GROUPS, "--optim.layer-decay", "0.7", "--optim.name", name]
    assert main(["verify", job, "--layouts", "1x2x8,1x1x16", *words]) == 0, capsys.readouterr()
