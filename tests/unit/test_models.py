"""The networks of this package: published parameter counts, and independent ghost batches."""

from __future__ import annotations

import hashlib
import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.nn.checks.model_keys import check_network
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch
from tests.helpers import job_tree

GROUP, NUM_CLASSES = 4, 5


def job_of(name: str, **model: Any) -> Job:
    return parse_job({**job_tree(), "model": {"name": name, "ghost_batch": GROUP, **model}})


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def convolutions(*widths: int) -> int:
    """Count the weights of 3×3 convolutions from each width to the next, and of their norms."""
    return sum(9 * a * b + 2 * b for a, b in pairwise(widths))


# Our networks with the shape of a sample, as small as the network allows.
SHAPES: dict[str, tuple[int, ...]] = {
    "small_conv_net": (12, 10, 1),
    "wrn_16_2": (12, 10, 3),
    "wrn_10_1": (12, 10, 1),
    "resnet20": (12, 10, 3),
    "vgg11_bn": (32, 32, 3),
    "alexnet": (29, 32, 3),
    "dense7": (54,),
}
each_network = pytest.mark.parametrize("name", SHAPES)


def build(name: str, seed: int = 3, **model: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(job_of(name, **model), SHAPES[name], NUM_CLASSES)


def samples(name: str, num_samples: int = 2 * GROUP) -> Tensor:
    height_width_channels = SHAPES[name]
    shape = (num_samples, height_width_channels[-1], *height_width_channels[:-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "published"),
    [
        ("wrn_16_4", 2_748_890, "2.7M"),  # Zagoruyko & Komodakis 2016, tables 4 and 5
        ("wrn_40_4", 8_949_210, "8.9M"),
        ("wrn_28_10", 36_479_194, "36.5M"),
        ("resnet20", 269_722, "0.27M"),  # He et al. 2016, table 6
        ("resnet32", 464_154, "0.46M"),
        ("resnet44", 658_586, "0.66M"),
        ("resnet56", 853_018, "0.85M"),
        ("resnet110", 1_727_962, "1.7M"),
        # github.com/bearpaw/pytorch-classification
        ("vgg19_bn", convolutions(3, 64, 64, 128, 128, *[256] * 4, *[512] * 8) + 512 * 10 + 10, "20.04M"),
        ("alexnet", 2_472_266, "2.47M"),
    ],
)
def test_it_has_the_parameters_of_its_paper(name: str, expected: int, published: str) -> None:
    with torch.device("meta"):
        model = build_model(job_of(name), (32, 32, 3), 10)
    assert count(model) == expected
    assert f"{expected / 1e6:.{len(published.split('.')[1]) - 1}f}M" == published


def test_the_counts_of_documents() -> None:
    with torch.device("meta"):
        assert count(build_model(job_of("small_conv_net"), (32, 32, 3), 10)) == 70_618
        dense7 = build_model(job_of("dense7"), (54,), 7)
    widths = (54, *[512] * 6)
    hidden = sum(a * b + 2 * b for a, b in pairwise(widths))
    assert count(dense7) == hidden + 512 * 7 + 7 == 1_348_103
    assert sum(isinstance(module, nn.Linear) for module in dense7.modules()) == 7


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_the_depth_of_vgg_counts_two_linear_layers_that_it_does_not_have(depth: int) -> None:
    with torch.device("meta"):
        model = build_model(job_of(f"vgg{depth}_bn"), (32, 32, 3), 10)
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) == depth - 2


# --- forward and backward -----------------------------------------------------------------------


@each_network
def test_every_parameter_gets_a_gradient_and_ghost_batches_are_independent(name: str) -> None:
    model, x = build(name), samples(name)
    logits = model(x)
    assert logits.shape == (2 * GROUP, NUM_CLASSES)
    torch.testing.assert_close(logits, torch.cat([model(part) for part in x.split(GROUP)]))
    nn.functional.cross_entropy(logits, torch.arange(2 * GROUP) % NUM_CLASSES).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any(), path


@each_network
def test_samples_are_independent_in_evaluation(name: str) -> None:
    model, x = build(name).eval(), samples(name, 3)
    torch.testing.assert_close(model(x), torch.cat([model(part) for part in x.split(1)]))


@each_network
def test_all_norms_have_the_jobs_ghost_batch_and_momentum(name: str) -> None:
    model: dict[str, Any] = {} if name == "alexnet" else {"bn_momentum": 0.25}
    norms = list(ghost_norms(build(name, **model)))
    assert {(norm.ghost_batch, norm.momentum) for norm in norms} == (set() if name == "alexnet" else {(GROUP, 0.25)})


@pytest.mark.parametrize("exact", [False, True])
def test_a_network_without_norms_is_trained(exact: bool) -> None:
    model, expected = build("alexnet"), build("alexnet")
    engine = UpdateEngine(model, build_optimizer(model, job_of("alexnet").optim), SingleRank(), exact=exact)
    x, labels = samples("alexnet"), torch.arange(2 * GROUP) % NUM_CLASSES
    passes = (MicroBatch(x[k : k + GROUP], labels[k : k + GROUP], (k // GROUP,)) for k in (0, GROUP))
    engine.update(passes, 2, Phase(0.0, 0.1, 0.0, 2 * GROUP, 2 * GROUP, start_samples=0, num_updates=1), 2)
    nn.functional.cross_entropy(expected(x), labels).backward()
    with torch.no_grad():
        for weight, before in zip(model.parameters(), expected.parameters(), strict=True):
            decay = 1e-3 * before if before.ndim > 1 else 0.0  # of job_tree
            assert before.grad is not None
            torch.testing.assert_close(weight, before - 0.1 * (before.grad + decay), rtol=1e-4, atol=1e-7)


def test_a_resnet_whose_residuals_are_0_is_its_shortcuts() -> None:
    model, x = build("resnet20").eval(), samples("resnet20")
    features: Any = model.features
    first, blocks = features[:3], features[3:]
    for block in blocks:
        nn.init.zeros_(block.residual[-1].weight)
    # option A: every other pixel twice, zeros in new channels; 16 of 64 channels are not zero
    expected = nn.functional.pad(first(x)[:, :, ::4, ::4], (0, 0, 0, 0, 0, 48))
    torch.testing.assert_close(features(x), expected)


def test_a_wide_resnet_whose_residuals_are_0_is_its_shortcuts() -> None:
    model, x = build("wrn_16_2"), samples("wrn_16_2")
    model.eval()
    features: Any = model.features
    expected, blocks = features[0](x), features[1:-2]
    assert len(blocks) == 6
    for k, block in enumerate(blocks):
        nn.init.zeros_(block.residual[-1].weight)
        if k % 2 == 0:  # the first block of a stage widens: a 1×1 convolution of the activation, not of x
            norm, relu = block.activate
            expected = block.shortcut(relu(norm(expected)))
    torch.testing.assert_close(features[:-2](x), expected)


# --- first weights ------------------------------------------------------------------------------


@each_network
def test_the_seed_alone_determines_the_first_weights(name: str) -> None:
    first, again, other = (list(build(name, seed).parameters()) for seed in (3, 3, 4))
    assert all(map(torch.equal, first, again))
    drawn = [not torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.ndim > 1]
    assert drawn
    assert all(drawn)


def test_the_first_weights_of_small_conv_net_are_those_of_recorded_runs() -> None:
    torch.manual_seed(0)
    state = build_model(job_of("small_conv_net"), (28, 28, 1), 10).state_dict()
    sha256 = hashlib.sha256()
    for name, value in state.items():
        sha256.update(name.encode() + value.numpy().tobytes())
    assert sha256.hexdigest() == "f51ba1925f93326288459c43835d8d9329fb628ab788c5047d17e904d94ff506"


@pytest.mark.parametrize("name", ["wrn_16_2", "resnet20", "vgg11_bn"])
def test_he_normal_by_fan_out(name: str) -> None:
    model = build(name)
    drawn = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in (conv for conv in drawn if conv.weight.numel() > 4000):
        std = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(std, rel=0.05)  # 4000 draws: 1.1 % is one σ
        assert conv.bias is None
    assert not model.get_parameter("classifier.bias").any()
    for norm in ghost_norms(model):
        assert norm.get_parameter("weight").eq(1).all()
        assert norm.get_parameter("bias").eq(0).all()


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smal_conv_net", "did you mean 'small_conv_net'? one of alexnet, dense7, resnetD of depth D = 6n+2, "),
        ("wrn_15_4", "must be wrn_D_K of depth D = 6n+4, nearest: wrn_10_4, wrn_16_4, got 'wrn_15_4'"),
        ("wrn_4_2", "must be wrn_D_K of depth D = 6n+4, nearest: wrn_10_2, got"),
        ("wrn_16_0", "did you mean 'wrn_16_4'?"),
        ("wrn-16-4", "did you mean 'wrn_16_4'?"),
        ("resnet21", "must be resnetD of depth D = 6n+2, nearest: resnet20, resnet26, got"),
        ("resnet50", "nearest: resnet44, resnet56; for ImageNet use 'torchvision.models:resnet50', got"),
        ("resnet18", "nearest: resnet14, resnet20; for ImageNet use 'torchvision.models:resnet18', got"),
        ("vgg18_bn", "nearest: vgg16_bn, vgg19_bn, got"),
        ("vgg19", "did you mean 'vgg19_bn'?"),
        ("inception_resnet_v3", "did you mean 'timm.models:inception_resnet_v2'?"),
        ("mynets:", "your own module:name, or one of torchvision or timm, got 'mynets:'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(JobError, match=re.escape(message)) as caught:
        job_of(name)
    assert [fault.path for fault in caught.value.faults] == ["model.name"]


@pytest.mark.parametrize(
    ("name", "model", "faults"),
    [
        ("wrn_16_4", {"channels": [8]}, ["model.channels: is not used by 'wrn_16_4', but by dense7, small_conv_net"]),
        ("alexnet", {"bn_momentum": 0.2}, ["model.bn_momentum: is not used by 'alexnet', but by dense7, resnetD"]),
        ("vgg19_bn", {"kwargs": {"a": 1}}, ["model.kwargs: is not used by 'vgg19_bn', but by your own module:name"]),
        (
            "mynets:build",
            {"channels": [8], "kwargs": {"a": 1}},
            ["model.channels: is not used by 'mynets:build', but by dense7, small_conv_net"],
        ),
        (
            "alexnet",
            {"channels": [8], "kwargs": {"a": [1]}},
            ["model.channels: is not used by", "model.kwargs: is not used by"],
        ),
        (
            "dense7",
            {"channels": [64] * 7},
            ["model.channels: dense7 has six hidden layers, so six widths, not 7: [64, 64, 64, 64, 64, 64, 64]"],
        ),
    ],
)
def test_a_key_that_a_network_does_not_use_is_refused(name: str, model: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(JobError) as caught:
        job_of(name, **model)
    assert [str(fault)[: len(text)] for fault, text in zip(caught.value.faults, faults, strict=True)] == faults


@each_network
def test_valid_names_pass(name: str) -> None:
    assert check_network(job_of(name).model) == []


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("alexnet", (28, 28, 1), "'alexnet' needs images of at least 29 × 29, these are (28, 28, 1)"),
        ("vgg11_bn", (64, 31, 3), "'vgg11_bn' needs images of at least 32 × 32, these are (64, 31, 3)"),
        ("wrn_16_4", (54,), "'wrn_16_4' takes images (H, W, C), the samples are rows (54,); rows are for dense7"),
        (
            "dense7",
            (8, 8, 1),
            "'dense7' takes rows (features,), the samples are images (8, 8, 1); images are for alexnet, ",
        ),
    ],
)
def test_samples_of_an_unsupported_shape_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(JobError, match=re.escape(f"model.name: {message}")):
        build_model(job_of(name), shape, NUM_CLASSES)


@pytest.mark.parametrize(("name", "side"), [("alexnet", 29), ("vgg11_bn", 32)])
def test_the_smallest_supported_image_works(name: str, side: int) -> None:
    with torch.device("meta"):
        model = build_model(job_of(name), (side, side, 1), NUM_CLASSES).eval()
        assert model(torch.zeros(1, 1, side, side)).shape == (1, NUM_CLASSES)
        with pytest.raises(RuntimeError, match=r"[Oo]utput size"):
            model(torch.zeros(1, 1, side - 1, side - 1))


def test_images_to_be_cropped_have_the_size_of_the_crop() -> None:
    data = {"source": "imagenet", "image_size": 28}
    job = parse_job({**job_tree(), "data": data, "model": {"name": "alexnet", "ghost_batch": GROUP}})
    with pytest.raises(JobError, match=r"at least 29 × 29, these are \(28, 28, 3\)"):
        build_model(job, (0, 0, 3), NUM_CLASSES)
