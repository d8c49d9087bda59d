"""Tasks: losses and metrics against torch and the definitions, keys, and the metrics by which a job selects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.task_specs import Direction
from hvd_batchgrow.data.data_record import fingerprint
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.samples.load_samples import load_samples
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.tasks.checked_losses import losses_of
from hvd_batchgrow.tasks.load_task import load_task, target_of
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.parts import _load_task
from tests.helpers import job_tree, measured_tree, small_job

HERE = "tests.unit.test_tasks"


def task(name: str, num_outputs: int, /, schema: Any = None, **keys: Any) -> Any:
    return load_task(TaskSection(name=name, **keys), num_outputs, schema or {})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(losses: Losses) -> dict[str, float]:
    return {name: float(total) / float(count) for name, (total, count) in losses.metrics.items()}


def mean(losses: Losses) -> Tensor:
    weight = len(losses.each) if losses.weights is None else losses.weights.sum()
    return losses.each.sum() / weight


CLASSES = torch.tensor([0, 2, 1, 2, 2, 0])


@pytest.mark.parametrize("training", [False, True])
def test_classification_is_torchs_cross_entropy_and_smooths_in_training_only(training: bool) -> None:
    logits = drawn(6, 3)
    found = task("classification", 3, label_smoothing=0.2)(logits, CLASSES, training=training)
    expected = functional.cross_entropy(logits, CLASSES, reduction="none", label_smoothing=0.2 if training else 0.0)
    assert torch.equal(found.each, expected)
    assert values(found) == {"top1": pytest.approx((logits.argmax(1) == CLASSES).double().mean().item())}
    assert 0 < values(found)["top1"] < 1


def test_class_weights_give_torchs_weighted_mean() -> None:
    logits, weights = drawn(6, 3), [1.0, 2.0, 0.5]
    expected = functional.cross_entropy(logits, CLASSES, weight=torch.tensor(weights).double())
    weighted = task("classification", 3, class_weights=tuple(weights))
    torch.testing.assert_close(mean(weighted(logits, CLASSES, training=True)), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(mean(task("classification", 3)(logits, CLASSES, training=True)), expected)
    # Targets that are probabilities of one class each mean the same.
    certain = functional.one_hot(CLASSES, 3).double()
    weighted.class_weights = weighted.class_weights.double()
    torch.testing.assert_close(mean(weighted(logits, certain, training=True)), expected)


@pytest.mark.parametrize("weights", [None, tuple(float(k) for k in range(1, 121))])
@pytest.mark.parametrize("target", [-100, -1, 120])
def test_a_target_that_is_not_a_class_is_an_error(weights: tuple[float, ...] | None, target: int) -> None:
    """The defect: torch ignores -100, so the sample had no loss, but counted; with weights, as one of class C - 100."""
    classification, logits = task("classification", 120, class_weights=weights), torch.zeros(4, 120)
    for training in (True, False):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            classification(logits, torch.tensor([0, target, 1, 2]), training=training)


def test_each_class_of_a_mixed_sample_counts_by_its_own_weight() -> None:
    """The gradient is p Σ w y - w y: at logits 0, 0.5 · 5.5 - 5 = -2.25 for the second class."""
    logits = torch.zeros(1, 2, requires_grad=True)
    weighted = task("classification", 2, class_weights=(1.0, 10.0))
    found = weighted(logits, torch.tensor([[0.5, 0.5]]), training=True)
    found.each.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[2.25, -2.25]]
    assert found.weights is not None
    assert found.weights.tolist() == [5.5]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_weighted_loss_of_a_mixed_sample_is_that_of_its_classes(smoothing: float) -> None:
    logits, soft, factors = drawn(6, 3), drawn(6, 3, seed=1).softmax(1), torch.tensor([1.0, 20.0, 0.5]).double()
    weighted = task("classification", 3, class_weights=tuple(factors.tolist()), label_smoothing=smoothing)
    found = weighted(logits, soft, training=True)
    parts = [weighted(logits, torch.full((6,), c), training=True) for c in range(3)]
    torch.testing.assert_close(found.each, sum(soft[:, c] * parts[c].each for c in range(3)))
    torch.testing.assert_close(found.weights, soft @ factors)
    # A target that is certain gives exactly the loss of its class.
    certain = weighted(logits, functional.one_hot(CLASSES, 3).double(), training=True)
    of_classes = weighted(logits, CLASSES, training=True)
    torch.testing.assert_close(certain.each, of_classes.each, rtol=1e-15, atol=0)
    assert torch.equal(certain.weights, of_classes.weights)
    if not smoothing:
        expected = functional.cross_entropy(logits, soft, weight=factors, reduction="none")
        torch.testing.assert_close(found.each, expected)


def test_soft_targets_give_torchs_cross_entropy_of_probabilities() -> None:
    logits, soft = drawn(6, 3), drawn(6, 3, seed=1).softmax(1)
    found = task("classification", 3)(logits, soft, training=True)
    torch.testing.assert_close(found.each, -(soft * logits.log_softmax(1)).sum(1))
    right = (logits.argmax(1) == soft.argmax(1)).double().mean().item()
    assert values(found) == {"top1": pytest.approx(right)}


def test_f1_is_that_of_all_labels_together() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -2.0, 0.5], [3.0, 1.0, -1.0]])
    present = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    found = task("multi_label", 3)(logits, present, training=False)
    # Predicted 0, 2 | 2 | 0, 1: TP = 1 + 1 + 1, FP = 1 + 0 + 1, FN = 1 + 0 + 1; 9 - 4 labels are right.
    assert values(found) == {"f1": pytest.approx(2 * 3 / (2 * 3 + 2 + 2)), "label_accuracy": pytest.approx(5 / 9)}
    torch.testing.assert_close(mean(found), functional.binary_cross_entropy_with_logits(logits, present))


def test_the_loss_of_a_target_that_is_neither_0_nor_1_is_nan() -> None:
    # The first samples of a torch Dataset are checked before training, the others only here.
    found = task("multi_label", 2)(drawn(3, 2), torch.tensor([[0.0, 1.0], [0.3, 1.0], [1.0, 1.0]]), training=True)
    assert found.each.isnan().tolist() == [False, True, False]


def test_pos_weights_are_torchs() -> None:
    logits, factors = drawn(5, 2), torch.tensor([3.0, 0.5], dtype=torch.float64)
    present = (drawn(5, 2, seed=2) > 0).double()
    weighted = task("multi_label", 2, pos_weights=(3.0, 0.5))
    weighted.pos_weights = factors
    expected = functional.binary_cross_entropy_with_logits(logits, present, pos_weight=factors)
    torch.testing.assert_close(mean(weighted(logits, present, training=True)), expected)


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
@pytest.mark.parametrize("standardize", [False, True])
def test_regression_is_torchs_loss_and_its_metrics_have_the_units_of_the_targets(loss: str, standardize: bool) -> None:
    outputs, targets = drawn(6, 2), 100 * drawn(6, 2, seed=3) + 500
    schema = {"target_mean": [480.0, 510.0], "target_std": [90.0, 110.0]}
    keys: dict[str, Any] = {"huber_delta": 0.7} if loss == "huber" else {}
    regression = task("regression", 2, schema, loss=loss, standardize=standardize, **keys)
    regression.mean, regression.std = regression.mean.double(), regression.std.double()
    found = regression(outputs, targets, training=True)
    center, scale = (
        torch.tensor(schema[key]) if standardize else default for key, default in zip(schema, (0, 1), strict=True)
    )
    functions = {"mse": functional.mse_loss, "l1": functional.l1_loss}
    wanted = (targets - center) / scale
    expected = (
        functions[loss](outputs, wanted) if loss in functions else functional.huber_loss(outputs, wanted, delta=0.7)
    )
    torch.testing.assert_close(mean(found), expected)
    predicted = outputs * scale + center
    assert values(found)["mae"] == pytest.approx((predicted - targets).abs().mean().item())
    assert values(found)["mse"] == pytest.approx((predicted - targets).square().mean().item())


@pytest.mark.parametrize("training", [False, True])
def test_a_language_model_averages_over_tokens_and_skips_those_that_do_not_count(training: bool) -> None:
    logits = drawn(3, 4, 5)
    targets = torch.tensor([[1, 2, 3, 4], [0, -100, -100, -100], [2, 2, -100, 0]])
    found = task("language_model", 5, label_smoothing=0.1)(logits, targets, training=training)
    flat = logits.flatten(0, 1), targets.flatten()
    plain = functional.cross_entropy(*flat)
    smoothed = functional.cross_entropy(*flat, label_smoothing=0.1)
    torch.testing.assert_close(mean(found), smoothed if training else plain)
    assert found.weights is not None
    assert found.weights.tolist() == [4, 1, 3]
    counted = targets >= 0
    right = (logits.argmax(2) == targets)[counted].double().mean().item()
    assert values(found) == {
        "bits_per_token": pytest.approx(plain.item() / math.log(2)),
        "top1": pytest.approx(right),
    }


# --- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"name": "clasification"}, "task.name: did you mean 'classification'.*, got 'clasification'"),
        ({"name": "losses.Focal"}, "task.name: did you mean 'losses:Focal'.*, got 'losses.Focal'"),
        (
            {"name": "regression", "label_smoothing": 0.1},
            "task.label_smoothing: is not used by 'regression', but by cl",
        ),
        ({"loss": "l1"}, "task.loss: is not used by 'classification', but by regression"),
        (
            {"name": "regression", "huber_delta": 2.0},
            "task.huber_delta: is not used with task.loss = 'mse', but with 'h",
        ),
        ({"kwargs": {"gamma": 2}}, "task.kwargs: is not used by 'classification', but by your own module:name"),
        (
            {"name": "regression"},
            "data.source: 'idx' has a class per sample, and the task needs numbers per sample: .*csv",
        ),
        ({"name": "language_model"}, "data.source: 'idx' has a class per sample, and the task needs tokens"),
    ],
)
def test_keys_that_the_task_would_ignore_and_sources_without_its_targets_are_faults(
    section: dict[str, Any], fault: str
) -> None:
    with pytest.raises(JobError, match=fault):
        small_job(task=section)


@pytest.mark.parametrize(
    ("num_outputs", "keys", "fault"),
    [
        (3, {"class_weights": (1.0, 2.0)}, "task.class_weights: has 2 numbers, and the data has 3 classes"),
        (
            2,
            {"name": "multi_label", "pos_weights": (1.0,)},
            "task.pos_weights: has 1 number, and the data has 2 labels",
        ),
        (1, {"name": "regression", "standardize": True}, r"task.standardize: needs the source's schema\[\"target_mean"),
    ],
)
def test_keys_that_contradict_the_data_are_faults(num_outputs: int, keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(JobError, match=fault):
        load_task(TaskSection(**keys), num_outputs, {})


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0, 4.0]])
def test_weights_are_compared_with_the_number_of_classes_that_the_job_states(weights: list[float]) -> None:
    small_job(task={"class_weights": weights})
    with pytest.raises(JobError, match=rf"task.class_weights: has {len(weights)} numbers?, and data.num_classes = 3"):
        small_job(task={"class_weights": weights}, data={"num_classes": 3})


@pytest.mark.parametrize(
    ("mean", "std", "fault"),
    [
        ([1.0], [1.0, 1.0], r"schema\[\"target_mean\"\] of the source must be 2 finite numbers .* is \[1.0\]"),
        (1.0, [1.0, 1.0], r"target_mean.* is 1.0"),
        ([[1.0, 2.0]], [1.0, 1.0], "target_mean.* must be 2 finite numbers"),
        ([1.0, float("nan")], [1.0, 1.0], "target_mean.* must be 2 finite numbers"),
        (["a", "b"], [1.0, 1.0], "target_mean.* must be 2 finite numbers"),
        ([1.0, 2.0], [1.0, float("inf")], "target_std.* must be 2 finite numbers"),
        ([1.0, 2.0], None, "target_std.* must be 2 finite numbers"),
        ([1.0, 2.0], [1.0, 0.0], r"target_std.* must be above 0, is \[1.0, 0.0\]; use 1 for a target that is constant"),
        ([1.0, 2.0], [1.0, -1.0], "target_std.* must be above 0"),
        ([1.0, 2.0], [1.0, 1e-60], "target_std.* must be above 0"),  # 0 in float32
    ],
)
def test_targets_are_standardized_only_by_one_finite_mean_and_positive_std_each(
    mean: Any, std: Any, fault: str
) -> None:
    with pytest.raises(JobError, match=f"task.standardize: .*{fault}"):
        task("regression", 2, {"target_mean": mean, "target_std": std}, standardize=True)


def test_labels_of_a_multi_label_task_are_0_or_1() -> None:
    check = task("multi_label", 2).check_targets
    check(torch.tensor([[0.0, 1.0], [1.0, 1.0]]).numpy())
    with pytest.raises(
        RunError, match=r"targets of 0 and 1; 2 are not: sample 0, label 1 is 0.5; sample 1, label 0 is 2"
    ):
        check(torch.tensor([[0.0, 0.5], [2.0, 1.0]]).numpy())


def test_only_classes_are_mixed() -> None:
    job = small_job(data={"source": "numpy", "mixup_alpha": 0.2}, task={"name": "multi_label"})
    with pytest.raises(JobError, match=r"data.mixup_alpha: mixes classes; set it to 0 with task.name = 'multi_label'"):
        compile_plan(job, 1, 240)


def test_the_task_affects_the_weights_and_may_not_change_at_a_resume() -> None:
    deciding = small_job(task={"label_smoothing": 0.1}).deciding(100)
    assert (deciding["task.name"], deciding["task.label_smoothing"]) == ("classification", 0.1)


# --- metrics by which a job selects ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trigger", "fault"),
    [
        (
            {"metric": "top2"},
            "trigger.metric: 'top2' is not a metric of the task 'classification'; did you mean 'top1'",
        ),
        ({"metric": "top1", "mode": "min"}, "trigger.mode: 'min': top1 improves when it rises; use 'max', or remove"),
        ({"metric": "loss", "mode": "max"}, "trigger.mode: 'max': loss improves when it falls; use 'min', or remove"),
    ],
)
def test_a_plateau_watches_a_metric_of_the_task(trigger: dict[str, Any], fault: str) -> None:
    with pytest.raises(JobError, match=fault):
        parse_and_plan(measured_tree("data", {"name": "plateau", **trigger}))


def test_a_metric_of_a_custom_task_needs_its_mode() -> None:
    tree = measured_tree(
        "data", {"name": "plateau", "metric": "val/f1", "patience_epochs": 1.0}, task={"name": f"{HERE}:Own"}
    )
    with pytest.raises(
        JobError, match=r"trigger.mode: is needed for a metric of a custom task: does f1 improve when it"
    ):
        parse_and_plan(tree)
    tree["trigger"]["mode"] = "max"
    parse_and_plan(tree)


def test_the_best_checkpoint_is_chosen_by_a_metric_of_the_task() -> None:
    best = {"data": {"validation_fraction": 0.2}, "checkpoint": {"keep_best": "val/f1"}}
    with pytest.raises(
        JobError, match=r"checkpoint.keep_best: 'val/f1' is not a metric of the task 'classification'; "
    ):
        parse_and_plan(job_tree(**best))
    with pytest.raises(JobError, match=r'checkpoint.keep_best: must be "val/loss" or "val/METRIC"'):
        small_job(data={"validation_fraction": 0.2}, checkpoint={"keep_best": "top1"})


def parse_and_plan(tree: dict[str, Any]) -> None:
    compile_plan(parse_job(tree), 1, 240)


# --- a custom task -----------------------------------------------------------------------------------


class Own:
    """Squared distance of the outputs from a one-hot target."""

    metrics = {"f1": "up"}  # noqa: RUF012  # as users write it

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        each = (outputs - self.scale * functional.one_hot(targets, outputs.shape[1])).square().sum(1)
        return Losses(each, metrics={"f1": (torch.ones(()), 2.0)})


class Values(Own):
    target = "values"


class NoMetrics:
    def __call__(self) -> None: ...


class Misnamed(Own):
    metrics = {"epoch": "up"}  # noqa: RUF012


class Averaged(Own):
    metrics = {"average_precision": "up"}  # noqa: RUF012


class Misdirected(Own):
    metrics = {"f1": "higher"}  # noqa: RUF012


class Misaimed(Own):
    target = "boxes"


def test_a_custom_task_is_called_with_its_arguments() -> None:
    found = load_task(TaskSection(name=f"{HERE}:Own", kwargs={"scale": 3.0}), 3, {})
    assert isinstance(found, Own)
    assert found.scale == 3.0
    assert target_of(TaskSection(name=f"{HERE}:Own")) is None
    assert target_of(TaskSection(name=f"{HERE}:Values")) == "values"


@pytest.mark.parametrize(
    ("name", "kwargs", "fault"),
    [
        (f"{HERE}:Ow", {}, "did you mean tests.unit.test_tasks:Own"),
        ("nowhere:Own", {}, "nowhere:Own cannot be imported: ModuleNotFoundError"),
        (f"{HERE}:Own", {"size": 1}, r"Own\(size=1\) failed: TypeError: .*unexpected keyword argument 'size'"),
        (f"{HERE}:NoMetrics", {}, r"metrics must be a dict such as .*, is None"),
        (f"{HERE}:Misdirected", {}, r"metrics must be a dict such as .*, is \{'f1': 'higher'\}"),
        (f"{HERE}:Misnamed", {}, "the metric 'epoch' has the name of another value in metrics.jsonl"),
        (
            f"{HERE}:Averaged",
            {},
            "the metric 'average_precision' must not begin with average_, .*rename it, .* to 'mean_precision'",
        ),
        (f"{HERE}:Misaimed", {}, 'target must be "class", "values" or "tokens", is \'boxes\''),
    ],
)
def test_a_custom_task_with_a_fault_is_refused(name: str, kwargs: dict[str, Any], fault: str) -> None:
    with pytest.raises(JobError, match=f"task.name: .*{fault}"):
        target_of(TaskSection(name=name, kwargs=kwargs))


class Faulty:
    """A custom task whose result is changed before it is returned."""

    def __init__(self, change: Any) -> None:
        self.change = change
        self.metrics: dict[str, Direction] = {"mae": "down", "worst": "down"}

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Any:
        errors = (outputs - targets).abs()
        losses = Losses(errors.mean(1), metrics={"worst": (0.0, 1), "mae": (errors.sum(), errors.numel())})
        return self.change(losses)


OTHERS: tuple[Any, Any] = torch.ones(2), []
"""An invalid metric, and an invalid container of metrics."""


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda found: found.each, r"returned Tensor"),
        (lambda found: Losses(found.each.mean(), metrics=found.metrics), r"each of shape \(\) for 6 samples"),
        (lambda found: Losses(found.each[:, None], metrics=found.metrics), r"each of shape \(6, 1\) for 6 samples"),
        (lambda found: Losses(found.each, torch.ones(1), found.metrics), r"weights of shape \(1,\) for 6 samples"),
        (
            lambda found: Losses(found.each, None, found.metrics, torch.ones(2, dtype=torch.bool)),
            r"correct of shape \(2,\) for 6 samples",
        ),
        (
            lambda found: Losses(found.each, None, found.metrics, torch.ones(6)),
            r"correct of type torch.float32 .*must have type torch.bool",
        ),
        (lambda found: Losses(found.each), r"the metrics \[\].* has \['mae', 'worst'\]"),
        (lambda found: Losses(found.each, metrics={**found.metrics, "loss": (1, 1)}), r"\['loss', 'mae', 'worst'\]"),
        (lambda found: Losses(found.each, metrics={**found.metrics, "mae": found.each.mean()}), r"Tensor for .*'mae'"),
        (lambda found: Losses(found.each, metrics={**found.metrics, "mae": (found.each, 6)}), r"\(6,\) and int"),
        (lambda found: Losses(found.each, metrics={**found.metrics, "mae": OTHERS[0]}), r"Tensor for .*'mae'"),
        (lambda found: Losses(found.each, metrics=OTHERS[1]), r"returned list as metrics; they must be a dict"),
    ],
)
def test_what_a_custom_task_returns_is_checked(change: Any, fault: str, training: bool) -> None:
    with pytest.raises(RunError, match=fault):
        losses_of(Faulty(change), drawn(6, 2), drawn(6, 2, seed=1), 6, training=training)


def test_the_second_term_of_a_loss_is_not_taken_for_weights() -> None:
    outputs, targets = drawn(6, 2).requires_grad_(), drawn(6, 2, seed=1)
    terms = Faulty(lambda found: Losses(found.each, 2 * found.each, found.metrics))
    fault = r"the weights have a gradient; add the terms of a loss: Losses\(a \+ b\)"
    with pytest.raises(RunError, match=fault):
        losses_of(terms, outputs, targets, 6, training=True)
    weighted = Faulty(lambda found: Losses(found.each, found.each.detach(), found.metrics))
    assert losses_of(weighted, outputs, targets, 6, training=True).weights is not None


def test_metrics_have_the_same_order_on_all_ranks_and_no_gradient() -> None:
    outputs = drawn(6, 2).requires_grad_()
    found = losses_of(Faulty(lambda found: found), outputs, drawn(6, 2, seed=1), 6, training=True)
    assert list(found.metrics) == ["mae", "worst"]
    assert not found.metrics["mae"][0].requires_grad  # type: ignore[union-attr]
    assert found.each.requires_grad


def test_the_targets_of_the_validation_set_are_checked_too() -> None:
    rows, right, wrong = np.zeros((4, 2), np.float32), np.ones((4, 1), np.float32), np.full((4, 1), 0.5, np.float32)
    train, validation = ArrayDataset(rows, right), ArrayDataset(rows, wrong)
    job = small_job(task={"name": "multi_label"}, data={"source": "numpy"})
    with pytest.raises(RunError, match=r"4 are not: sample 0, label 0 is 0\.5"):
        _load_task(job, Datasets(train, train, 1, (0.0, 0.0), (1.0, 1.0), validation=validation))


class Picky:
    """A custom task that refuses all targets by an exception of Python, as docs/job-file.md suggests."""

    metrics: Mapping[str, Direction] = {"mae": "down"}

    def __call__(self, outputs: Tensor, targets: Any, *, training: bool) -> Losses:
        raise AssertionError

    def check_targets(self, targets: Any) -> None:
        raise ValueError(f"the sum is {sum(part.sum() for part in targets.values())}")


class Pairs:
    """A torch Dataset whose targets are dicts."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.ones(2), {"a": torch.tensor([1.0, 2.0]), "b": index}


def test_an_error_of_check_targets_names_the_task_and_targets_may_be_trees() -> None:
    name = f"{__name__}:Picky"
    data = DataSection(source="own:pairs", num_classes=2)
    source = load_samples((Pairs(), Pairs()), data, 0, None)
    job = small_job(task={"name": name}, data={"source": "own:pairs"})
    with pytest.raises(JobError, match=rf"task.name: {name} refuses the targets: ValueError: the sum is 18"):
        _load_task(job, source)  # 4 · (1 + 2) + 0 + 1 + 2 + 3
    assert fingerprint(source) == {"mean": (), "std": ()}


def test_metrics_may_be_numbers_of_numpy() -> None:
    numbers: Any = {"mae": (np.float32(1.5), np.int64(6)), "worst": (np.int64(2), 1)}
    change = Faulty(lambda found: Losses(found.each, metrics=numbers))
    found = losses_of(change, drawn(6, 2), drawn(6, 2, seed=1), 6, training=False)
    assert found.metrics == {"mae": (1.5, 6), "worst": (2, 1)}
