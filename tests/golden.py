"""One update worked out without any of our layout code, for the same samples served in any layout.

The samples are 12 groups of 8, in float64. Whether they come as one batch, as micro-batches or from
ranks, loss, gradients, running statistics and weights must be these.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.data.order.stream import ghost_batches_of_rank
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm
from hvd_batchgrow.nn.networks import small_conv_net
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.tasks.classification import Classification
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.forward import MicroBatch, forward_of
from tests.helpers import small_job

GROUP, NUM_GROUPS, NUM_UPDATES = 8, 12, 3
LR, MOMENTUM, WEIGHT_DECAY, GHOST_MOMENTUM = 0.05, 0.9, 1e-3, 0.1


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return small_conv_net.build(1, 3, channels=(4, 8), ghost_batch=GROUP, bn_momentum=GHOST_MOMENTUM).double()


def samples(update: int) -> tuple[Tensor, Tensor]:
    """The update's images and labels in stream order."""
    generator = torch.Generator().manual_seed(100 + update)
    shape = (NUM_GROUPS * GROUP, 1, 8, 8)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (shape[0],), generator=generator)


def phase(num_ghost_batches: int = NUM_GROUPS) -> Phase:
    return Phase(
        0.0,
        LR,
        MOMENTUM,
        num_ghost_batches * GROUP,
        num_ghost_batches * GROUP,
        start_samples=0,
        num_updates=NUM_UPDATES,
    )


def reference(
    num_ghost_batches: int = NUM_GROUPS, smoothing: float = 0.0, clip_norm: float = math.inf
) -> tuple[nn.Module, list[float]]:
    """NUM_UPDATES updates from the formulas: model and mean losses.

    Every ghost batch goes through a plain network with nn.BatchNorm2d on its own, so that PyTorch
    computes its statistics and advances the running ones in stream order; the losses are summed,
    divided by B once, and SGD is written out: u = m u + (g + λ w), w -= ε u.
    """
    model = _with_batch_norm(make_model())
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses = []
    for update in range(NUM_UPDATES):
        images, labels = (part[: num_ghost_batches * GROUP] for part in samples(update))
        logits = torch.cat([model(chunk) for chunk in images.split(GROUP)])
        # Smoothing gives each class, the right one too, its even part of a share of the target.
        targets = nn.functional.one_hot(labels, 3).double() * (1 - smoothing) + smoothing / 3
        loss = -(targets * logits.log_softmax(1)).sum() / len(labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
        gradients = tuple(g * min(1.0, clip_norm / norm) for g in gradients)
        with torch.no_grad():
            for (name, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
                decay = WEIGHT_DECAY if weight.ndim > 1 else 0.0
                velocity[name] = MOMENTUM * velocity[name] + gradient + decay * weight
                weight.sub_(LR * velocity[name])
        losses.append(loss.item())
    return model, losses


def _with_batch_norm(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    features = plain.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    for index, module in enumerate(features):
        if isinstance(module, GhostBatchNorm):
            features[index] = nn.BatchNorm2d(module.num_features, momentum=GHOST_MOMENTUM).double()
    return plain


def make_engine(
    ranks: Ranks, *, exact: bool = False, rule: UpdateSection | None = None, smoothing: float = 0.0
) -> UpdateEngine:
    model = make_model()
    optim = small_job(optim={"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}).optim
    forward = forward_of(Classification(smoothing), (rule or UpdateSection()).precision)
    return UpdateEngine(model, build_optimizer(model, optim), ranks, exact=exact, rule=rule, forward=forward)


def serve(
    engine: UpdateEngine, ranks: Ranks, per_pass: int, update: int, num_ghost_batches: int = NUM_GROUPS, order: int = 1
) -> UpdateResult:
    """Do one update with the samples of all ranks, `per_pass` groups per micro-batch; order -1 reverses them."""
    images, labels = samples(update)
    images = images.to(next(engine.model.parameters()).dtype)
    mine = ghost_batches_of_rank(0, num_ghost_batches, ranks.rank, ranks.size)[::order]
    passes = [mine[i : i + per_pass] for i in range(0, len(mine), per_pass)]

    def micro_batches() -> Iterator[MicroBatch]:
        for groups in passes:
            entries = torch.cat([torch.arange(k * GROUP, (k + 1) * GROUP) for k in groups])
            yield MicroBatch(images[entries], labels[entries], tuple(groups))

    return engine.update(micro_batches(), len(passes), phase(num_ghost_batches), num_ghost_batches)


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    """Parameters and running statistics agree to float64 rounding."""
    state = {name: value for name, value in expected.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert model.state_dict().keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-11, atol=1e-13, msg=name)
