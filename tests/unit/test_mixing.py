"""Mixup and CutMix within ghost batches: shares, partners, boxes and soft targets."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hvd_batchgrow.data.pipeline.mixing import Mix, Mixing
from hvd_batchgrow.schedule.validation.key_checks import key_faults
from hvd_batchgrow.tasks.classification import Classification
from hvd_batchgrow.torchvision_shim import import_torchvision
from hvd_batchgrow.train.update.forward import MicroBatch, forward_of
from tests.helpers import NUM_TRAIN, small_job

MIXUP = Mixing(mixup_alpha=0.4, cutmix_alpha=0.0, prob=1.0, switch_prob=0.5, seed=3, ghost_batch=8, num_classes=5)
CUTMIX = replace(MIXUP, mixup_alpha=0.0, cutmix_alpha=1.0)
BOTH = replace(MIXUP, cutmix_alpha=1.0)
SIZE = (6, 9)


def images_of(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((count, 3, *SIZE), dtype=np.float32))


def classes_of(count: int) -> torch.Tensor:
    return torch.arange(count) * 7 % 5


def drawn(mixing: Mixing, count: int, size: tuple[int, int] = SIZE) -> list[Mix]:
    return [mix for k in range(count) if (mix := mixing.sample(k, size))]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_share_has_the_mean_and_variance_of_its_beta_distribution(alpha: float) -> None:
    lams = np.array([mix.lam for mix in drawn(replace(MIXUP, mixup_alpha=alpha), 4000)])
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(α, α)
    assert lams.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
    assert lams.var() == pytest.approx(variance, rel=0.1)
    assert (lams * 2**24 == np.rint(lams * 2**24)).all()


def test_every_sample_has_another_one_as_its_partner_and_any_may_be() -> None:
    pairs = np.stack([mix.partners for mix in drawn(MIXUP, 2000)])
    assert (np.sort(pairs, axis=1) == np.arange(8)).all()
    assert (pairs != np.arange(8)).all()
    counts = np.stack([np.bincount(column, minlength=8) for column in pairs.T])
    expected = 2000 / 7 * (1 - np.eye(8))
    assert np.abs(counts - expected).max() < 5 * math.sqrt(2000 / 7)
    assert [mix.partners.tolist() for mix in drawn(replace(MIXUP, ghost_batch=2), 3)] == [[1, 0]] * 3


def test_boxes_have_the_drawn_area_and_the_share_is_that_of_the_box() -> None:
    """A box that is not cut at an edge has 1 - λ of the area, to within the rounding of its sides."""
    size = (40, 60)
    inside, shares = 0, []
    for k in range(1500):
        mix, drawn_share = CUTMIX.sample(k, size), replace(CUTMIX, mixup_alpha=1.0, cutmix_alpha=0.0).sample(k, size)
        assert mix is not None
        assert mix.box is not None
        assert drawn_share is not None
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 40
        assert 0 <= left <= right <= 60
        assert mix.lam == 1 - (bottom - top) * (right - left) / 2400
        shares.append(mix.lam)
        if top > 0 and left > 0 and bottom < 40 and right < 60:
            inside += 1
            side = math.sqrt(1 - drawn_share.lam)
            assert 0 <= side * 40 - (bottom - top) < 2
            assert 0 <= side * 60 - (right - left) < 2
    assert inside > 200
    assert np.mean(shares) > 0.55  # boxes are cut at the edges, so more than half of an image remains on average


def test_probabilities_of_mixing_and_of_cutmix() -> None:
    mixing = replace(BOTH, prob=0.6, switch_prob=0.25)
    found = drawn(mixing, 4000)
    assert len(found) / 4000 == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / 4000))
    cut = np.mean([mix.box is not None for mix in found])
    assert cut == pytest.approx(0.25, abs=4 * math.sqrt(0.1875 / len(found)))
    assert all(mix.box is None for mix in drawn(replace(MIXUP, switch_prob=0.9), 50))
    assert all(mix.box is not None for mix in drawn(replace(CUTMIX, switch_prob=0.1), 50))


def test_draws_belong_to_the_seed_and_the_ghost_batch() -> None:
    first, again, other, seed = (
        replace(MIXUP, seed=seed).sample(k, SIZE) for seed, k in ((3, 2**40), (3, 2**40), (3, 2**40 + 1), (4, 2**40))
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert seed is not None
    assert (first.lam, first.partners.tolist()) == (again.lam, again.partners.tolist())
    assert len({first.lam, other.lam, seed.lam}) == 3


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX, BOTH, replace(BOTH, prob=0.5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_and_targets_are_mixed_by_definition(mixing: Mixing, *, channels_last: bool) -> None:
    form = torch.channels_last if channels_last else torch.contiguous_format
    groups = [4, 9, 11, 2]
    images, classes = images_of(32), classes_of(32)
    mixed = images.clone(memory_format=form)
    targets = mixing.mix(mixed, classes, groups)
    assert mixed.is_contiguous(memory_format=form)
    assert (targets.dtype, targets.shape) == (torch.float32, (32, 5))
    for k, group in enumerate(groups):
        mix = mixing.sample(group, SIZE)
        for i in range(8):
            own, image = 8 * k + i, images[8 * k + i].numpy()
            expected_target = np.zeros(5)
            if mix is None:
                expected, expected_target[classes[own]] = image, 1
            else:
                other = 8 * k + int(mix.partners[i])
                expected_target[classes[own]] += mix.lam
                expected_target[classes[other]] += 1 - mix.lam
                if mix.box is None:
                    expected = mix.lam * image + (1 - mix.lam) * images[other].numpy()
                else:
                    top, left, bottom, right = mix.box
                    expected = image.copy()
                    expected[:, top:bottom, left:right] = images[other].numpy()[:, top:bottom, left:right]
            assert mixed[own].numpy() == pytest.approx(expected, abs=1e-6)
            assert targets[own].numpy() == pytest.approx(expected_target, abs=1e-7)


def test_a_ghost_batch_is_mixed_the_same_alone_and_among_others() -> None:
    groups = [5, 6, 30, 7]
    images, classes = images_of(32), classes_of(32)
    together = images.clone()
    targets = BOTH.mix(together, classes, groups)
    for k, group in enumerate(groups):
        part = slice(8 * k, 8 * k + 8)
        alone = images[part].clone()
        assert torch.equal(BOTH.mix(alone, classes[part], [group]), targets[part])
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX])
def test_mixing_is_that_of_torchvision(mixing: Mixing) -> None:
    """torchvision's partner is the sample before: given the samples in the order of the cycle of partners."""
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("needs torchvision")
    v2 = importlib.import_module("torchvision.transforms.v2")
    images, classes = images_of(8), classes_of(8)
    mix = mixing.sample(1, SIZE)
    assert mix is not None
    order = [0]
    while len(order) < 8:
        order.insert(0, int(mix.partners[order[0]]))
    params = {"lam": mix.lam, "lam_adjusted": mix.lam, "labels": classes[order], "batch_size": 8}
    if mix.box:
        top, left, bottom, right = mix.box
        params["box"] = left, top, right, bottom
    theirs = (v2.CutMix if mix.box else v2.MixUp)(num_classes=5)
    mixed = images.clone()
    targets = mixing.mix(mixed, classes, [1])
    torch.testing.assert_close(mixed[order], theirs.transform(images[order], params), rtol=0, atol=1e-6)
    torch.testing.assert_close(targets[order], theirs.transform(params["labels"], params), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_mixed_targets_is_the_mixture_of_the_losses(dtype: torch.dtype, smoothing: float) -> None:
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(4, 5).to(dtype), torch.randn(8, 4).to(dtype)
    first, second = classes_of(8), classes_of(8).roll(1)
    lam = 0.7
    targets = lam * torch.eye(5)[first] + (1 - lam) * torch.eye(5)[second]
    forward = forward_of(Classification(smoothing), "float32")
    soft, one, two = (forward(model, MicroBatch(inputs, t, (0,))) for t in (targets, first, second))
    torch.testing.assert_close(soft.each, lam * one.each + (1 - lam) * two.each)
    assert soft.each.dtype == dtype
    assert [int(count) for _, count in (soft.metrics["top1"], one.metrics["top1"])] == [8, 8]
    assert int(soft.metrics["top1"][0]) == int(one.metrics["top1"][0])  # 0.7 is the larger share


@pytest.mark.parametrize("key", ["mixup_alpha", "cutmix_alpha"])
def test_ghost_batches_of_one_sample_cannot_be_mixed(key: str) -> None:
    job = small_job(data={key: 0.5})
    assert not key_faults(job, NUM_TRAIN)
    alone = job.model_copy(update={"model": job.model.model_copy(update={"ghost_batch": 1})})
    assert f"data.{key}: mixes the samples of a ghost batch, and model.ghost_batch = 1; use >= 2, or set it to 0" in [
        str(fault) for fault in key_faults(alone, NUM_TRAIN)
    ]
