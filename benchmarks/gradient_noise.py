"""Measure what the measurement of the gradient noise adds to an update of the small convolutional net.

mpirun -np 2 --bind-to none python -m benchmarks.gradient_noise [--turns 41] [--updates 10] [--passes 1 5] [--cpu-time]

Updates with and without it alternate in one run, over the same samples. The table shows updates/s and their ratio in
each turn. One micro-batch and several differ: with several, the gradient of each is kept separately. A micro-batch has
four ghost batches. "norm layers alone" does not measure the micro-batches, as in an update of one micro-batch on one
rank. In the second network, group norms replace the ghost norms.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.small_updates import Contestants, compare, make_updates
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm
from hvd_batchgrow.nn.norm_gradients import NormGradients
from hvd_batchgrow.train.update.gradient_norms import GradientNorms

_GROUPS_OF_PASS = 4


class _LayersAlone(GradientNorms):
    """Measures the norm layers alone, in updates of any number of micro-batches and ranks."""

    def begin(self, magnitude: int = 0, *, is_single: bool = False) -> None:
        super().begin(magnitude, is_single=True)


def with_group_norms(model: nn.Module) -> nn.Module:
    """Replace all ghost norms by group norms."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, GhostBatchNorm):
                setattr(parent, name, nn.GroupNorm(8, child.num_features))
    return model


def contestants_of(change: Callable[[nn.Module], nn.Module]) -> Callable[[Ranks, int, int], Contestants]:
    """Return a function that makes contestants, which share one engine and differ only in how it measures the noise."""

    def make(ranks: Ranks, num_micro_batches: int, num_updates: int) -> Contestants:
        engine, update = make_updates(
            ranks, num_micro_batches, num_updates, ghost_batches_per_micro_batch=_GROUPS_OF_PASS, change=change
        )
        members, layers = engine.buckets.members, NormGradients(engine.model)

        def contestant(norms: GradientNorms | None) -> Callable[[], int]:
            def work() -> int:
                engine.buckets.norms = norms
                return update()

            return work

        return {
            "not measured": contestant(None),
            "micro-batches": contestant(GradientNorms(members)),
            "norm layers alone": contestant(_LayersAlone(members, layers=layers)),
            "both": contestant(GradientNorms(members, layers=layers)),
        }

    return make


if __name__ == "__main__":
    compare(
        __doc__,
        {"ghost norms": contestants_of(lambda model: model), "group norms": contestants_of(with_group_norms)},
        "not measured",
    )
