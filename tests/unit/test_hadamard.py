"""The Hadamard classifier: its matrix, its logits, what is trained, and where it is refused."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.nn.hadamard import HadamardClassifier, hadamard, most_classes
from hvd_batchgrow.nn.load_weights import load_weights
from hvd_batchgrow.nn.weights_file import read_weights
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.optim.groups import parameter_groups
from tests.helpers import job_tree

NUM_CLASSES = 5
SHAPES: dict[str, tuple[int, ...]] = {
    "small_conv_net": (12, 10, 1),
    "wrn_10_1": (12, 10, 1),
    "resnet20": (12, 10, 3),
    "vgg11_bn": (32, 32, 3),
    "alexnet": (29, 32, 3),
    "dense7": (54,),
}


def job_of(name: str, *, task: dict[str, Any] | None = None, optim: dict[str, Any] | None = None, **model: Any) -> Job:
    tree = job_tree(optim=optim or {}, task=task or {})
    return parse_job({**tree, "model": {"name": name, "ghost_batch": 4, **model}})


def build(name: str, num_classes: int = NUM_CLASSES, **model: Any) -> nn.Module:
    torch.manual_seed(3)
    return build_model(job_of(name, **model), SHAPES[name], num_classes)


# --- the matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 256])
def test_it_is_sylvesters_matrix_with_orthogonal_rows(order: int) -> None:
    doubled = np.ones((1, 1))
    while len(doubled) < order:
        doubled = np.block([[doubled, doubled], [doubled, -doubled]])
    matrix = hadamard(order, order).numpy()
    np.testing.assert_array_equal(matrix, doubled)
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))
    rows, columns = max(1, order // 3), max(1, order - 3)
    np.testing.assert_array_equal(hadamard(rows, columns).numpy(), doubled[:rows, :columns])


@pytest.mark.parametrize("width", range(1, 34))
def test_its_rows_differ_up_to_the_most_classes_and_no_further(width: int) -> None:
    most = most_classes(width)
    rows = hadamard(most + 1, width)
    assert not any(torch.equal(a, b) for a, b in combinations(rows[:most], 2))
    assert torch.equal(rows[0], rows[most])
    HadamardClassifier(width, most)
    with pytest.raises(ValueError, match=f"has {most} different rows, too few for {most + 1} classes") as caught:
        HadamardClassifier(width, most + 1)
    found = re.search(r">= (\d+) features", str(caught.value))
    assert found
    enough = int(found[1])
    HadamardClassifier(enough, most + 1)
    with pytest.raises(ValueError, match="different rows"):
        HadamardClassifier(enough - 1, most + 1)


# --- logits and gradients ------------------------------------------------------------------------


def test_logits_and_gradients_are_those_of_the_formula() -> None:
    """s H x/|x| + c. The gradient of s is Σ g · H x/|x|, of x it is s/|x| (Hᵀ g without its part along x)."""
    generator = np.random.default_rng(1)
    x, g = generator.normal(size=(6, 12)), generator.normal(size=(6, NUM_CLASSES))
    classifier = HadamardClassifier(12, NUM_CLASSES)
    assert classifier.scale.item() == pytest.approx(NUM_CLASSES**-0.5)
    assert not classifier.bias.any()
    classifier.scale.data.fill_(1.7)
    classifier.bias.data = torch.arange(NUM_CLASSES).float()
    inputs = torch.from_numpy(x).float().requires_grad_()
    logits = classifier(inputs)
    logits.backward(torch.from_numpy(g).float())
    h = np.array([[(-1.0) ** (i & k).bit_count() for k in range(12)] for i in range(NUM_CLASSES)])
    lengths = np.sqrt((x**2).sum(1, keepdims=True))
    unit = x / lengths
    np.testing.assert_allclose(logits.detach(), 1.7 * unit @ h.T + np.arange(NUM_CLASSES), rtol=1e-5, atol=1e-5)
    assert inputs.grad is not None
    along = ((g @ h) * unit).sum(1, keepdims=True) * unit
    np.testing.assert_allclose(inputs.grad, 1.7 * (g @ h - along) / lengths, rtol=1e-4, atol=1e-5)
    assert classifier.scale.grad is not None
    assert classifier.bias.grad is not None
    np.testing.assert_allclose(classifier.scale.grad, [(g * (unit @ h.T)).sum()], rtol=1e-5)
    np.testing.assert_allclose(classifier.bias.grad, g.sum(0), rtol=1e-5)


def test_an_input_of_zeros_has_the_biases_as_logits_and_a_finite_gradient() -> None:
    classifier, x = HadamardClassifier(8, 3), torch.zeros(2, 8)
    x[1] = 1e-30
    classifier.bias.data.fill_(0.25)
    inputs = x.requires_grad_()
    logits = classifier(inputs)
    torch.testing.assert_close(logits, torch.full((2, 3), 0.25))
    logits.square().sum().backward()
    assert inputs.grad is not None
    assert float(inputs.grad.abs().max()) < 10


def test_large_half_precision_inputs_do_not_overflow() -> None:
    classifier = HadamardClassifier(64, 3)
    x = torch.full((2, 64), 3e4, dtype=torch.float16)
    expected = classifier(x.float() / 3e4)
    torch.testing.assert_close(classifier(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier.half()(x), expected.half(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_has_logits_of_its_type_and_float32_gradients(dtype: torch.dtype) -> None:
    classifier, x = HadamardClassifier(64, 3), torch.randn(8, 64)
    with torch.autocast("cpu", dtype):
        logits = classifier(x.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), classifier(x), rtol=0.02, atol=0.02)
    logits.float().square().sum().backward()
    assert {p.grad.dtype for p in classifier.parameters() if p.grad is not None} == {torch.float32}


def test_an_empty_batch_has_no_logits_and_gradients_of_zeros() -> None:
    classifier = HadamardClassifier(8, 3)
    logits = classifier(torch.zeros(0, 8))
    assert logits.shape == (0, 3)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in classifier.parameters())


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_it_replaces_the_linear_classifier_of_each_network_and_nothing_else(name: str) -> None:
    linear, fixed = build(name), build(name, classifier="hadamard")
    trained = dict(fixed.named_parameters())
    assert trained.keys() - dict(linear.named_parameters()).keys() == {"classifier.scale"}
    assert linear.state_dict().keys() - fixed.state_dict().keys() == {"classifier.weight"}  # no checkpoint has it
    for path, value in linear.state_dict().items():
        if not path.startswith("classifier"):
            assert torch.equal(fixed.state_dict()[path], value), path
    height_width_channels = SHAPES[name]
    x = torch.randn(8, height_width_channels[-1], *height_width_channels[:-1])
    seen: list[Tensor] = []
    fixed.get_submodule("classifier").register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    logits = fixed(x)
    h = hadamard(NUM_CLASSES, seen[0].shape[1])
    expected = nn.functional.normalize(seen[0]) @ h.T / NUM_CLASSES**0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    nn.functional.cross_entropy(logits, torch.arange(8) % NUM_CLASSES).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained.values())


@pytest.mark.parametrize(
    ("num_classes", "linear", "fixed"), [(10, 10_995_560, 10_985_324), (100, 11_088_080, 10_985_684)]
)
def test_the_gradient_bytes_of_documents(num_classes: int, linear: int, fixed: int) -> None:
    """The linear layer of 256 features has 257 C parameters; the Hadamard classifier has 1 + C."""
    assert linear - fixed == 4 * (257 * num_classes - (1 + num_classes))
    found = []
    for classifier in ("linear", "hadamard"):
        with torch.device("meta"):
            model = build_model(job_of("wrn_16_4", classifier=classifier), (32, 32, 3), num_classes)
        found.append(sum(p.numel() * p.element_size() for p in model.parameters()))
    assert found == [linear, fixed]
    page = Path("docs/job-file.md").read_text()
    for number in (linear, fixed):
        assert f"{number:,}".replace(",", " ") in page


def test_scale_and_bias_have_the_rule_of_biases() -> None:
    model = build("small_conv_net", classifier="hadamard")
    own = {id(p) for p in model.get_submodule("classifier").parameters()}
    assert len(own) == 2
    optim: dict[str, Any]
    for optim, decay in (({}, 0.0), ({"decay_norm_and_bias": True}, 1e-3), ({"name": "lars"}, 0.0)):
        job = job_of("small_conv_net", classifier="hadamard", optim=optim)
        groups = build_optimizer(model, job.optim).param_groups
        (group,) = [group for group in groups if own <= {id(p) for p in group["params"]}]
        assert group["weight_decay"] == decay
        assert group.get("adapt", False) is False  # LARS does not scale them
        assert all(p.ndim == 1 for p in group["params"])


def test_keys_of_fine_tuning_find_it() -> None:
    frozen = build("small_conv_net", classifier="hadamard", freeze=["features*"])
    assert [path for path, p in frozen.named_parameters() if p.requires_grad] == ["classifier.bias", "classifier.scale"]
    optim = {"layer_decay": 0.5, "groups": [{"match": "classifier.scale", "lr_scale": 3.0}]}
    job = job_of("small_conv_net", classifier="hadamard", optim=optim)
    model = build("small_conv_net", classifier="hadamard")
    groups = parameter_groups(model, job.optim)
    scale, bias = model.get_parameter("classifier.scale"), model.get_parameter("classifier.bias")
    assert [group.lr_scale for group in groups if any(p is scale for p in group.parameters)] == [3.0]
    assert [group.lr_scale for group in groups if any(p is bias for p in group.parameters)] == [1.0]  # the last layer


# --- errors --------------------------------------------------------------------------------------


def test_own_networks_and_numbers_are_refused() -> None:
    with pytest.raises(JobError, match=r"model.classifier: is not used by 'mynets:build', but by alexnet, dense7, "):
        job_of("mynets:build", classifier="hadamard")
    fault = (
        "model.classifier: 'hadamard' is for classes or labels, and task.name = 'regression' has numbers; "
        "use 'linear', or one of the tasks 'classification', 'multi_label'"
    )
    data = {"source": "csv", "root": ".", "num_samples": 300}
    tree = job_tree(task={"name": "regression"}) | {"data": data}
    model = {"name": "dense7", "ghost_batch": 4, "classifier": "hadamard"}
    with pytest.raises(JobError, match=re.escape(fault)):
        parse_job({**tree, "model": model})
    parse_job({**tree, "model": model | {"classifier": "linear"}})
    parse_job({**tree, "task": {"name": "multi_label"}, "model": model})
    with pytest.raises(JobError, match=r"model.classifier: must be 'linear' or 'hadamard', got 'Hadamard'"):
        job_of("dense7", classifier="Hadamard")


def test_classes_that_the_matrix_cannot_separate_are_refused() -> None:
    build("resnet20", 64, classifier="hadamard")
    message = (
        "model.classifier: 'resnet20': a Hadamard matrix with 64 columns has 64 different rows, too few for "
        "100 classes: classes 0 and 64 would have the same row; use a network with >= 65 features before its "
        "classifier, or 'linear'"
    )
    with pytest.raises(JobError, match=re.escape(message)):
        build("resnet20", 100, classifier="hadamard")


# --- files of weights and probes -----------------------------------------------------------------


def saved(path: Path, num_classes: int = NUM_CLASSES, **model: Any) -> Path:
    torch.save(build("small_conv_net", num_classes, **model).state_dict(), path)
    return path


def faults(model: nn.Module, path: Path) -> list[str]:
    with pytest.raises(JobError) as caught:
        load_weights(model, read_weights(str(path)), NUM_CLASSES, allow_new_head=False)
    return [str(fault).removeprefix(f"model.pretrained: {path}: ") for fault in caught.value.faults]


def test_a_file_with_the_other_kind_of_classifier_needs_a_new_head(tmp_path: Path) -> None:
    for kinds in (("linear", "hadamard"), ("hadamard", "linear")):
        path = saved(tmp_path / f"{kinds[0]}.pt", classifier=kinds[0])
        model, initial = (build("small_conv_net", classifier=kinds[1]) for _ in range(2))
        with torch.no_grad():
            model.get_parameter("features.0.weight").zero_()
        names = ", ".join(path for path, _ in model.named_parameters() if path.startswith("classifier"))
        about = f"the classifier ({names}) is {kinds[0]} in the file, {kinds[1]} in the job"
        found = faults(model, path)
        assert len(found) == 3
        assert found[-1] == f"{about}; model.allow_new_head = true keeps its initial weights"
        notes = load_weights(model, read_weights(str(path)), NUM_CLASSES, allow_new_head=True)
        assert notes[1] == f"{about}: it keeps its initial weights"
        state = torch.load(path, weights_only=True)
        for name, value in model.state_dict().items():
            is_head = name.startswith("classifier")
            assert torch.equal(value, (initial.state_dict() if is_head else state)[name]), name


def test_a_file_with_a_hadamard_classifier_is_loaded_if_the_classes_agree(tmp_path: Path) -> None:
    model = build("small_conv_net", classifier="hadamard")
    source = build("small_conv_net", classifier="hadamard")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    torch.save(source.state_dict(), tmp_path / "same.pt")
    load_weights(model, read_weights(str(tmp_path / "same.pt")), NUM_CLASSES, allow_new_head=False)
    assert model.get_parameter("classifier.scale").item() == pytest.approx(1 + NUM_CLASSES**-0.5)
    other = saved(tmp_path / "seven.pt", 7, classifier="hadamard")
    about = f"the classifier (classifier.bias, classifier.scale) has 7 classes in the file, {NUM_CLASSES} in the data"
    assert faults(model, other) == [
        f"classifier.bias is (7,), must be ({NUM_CLASSES},)",
        f"{about}; model.allow_new_head = true keeps its initial weights",
    ]
    notes = load_weights(model, read_weights(str(other)), NUM_CLASSES, allow_new_head=True)
    assert notes[1] == f"{about}: it keeps its initial weights"
