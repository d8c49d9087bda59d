"""The noise scale of SGD, and the learning rate that gives a wanted one."""

from __future__ import annotations


def noise_scale(lr: float, momentum: float, global_batch: int, num_samples: int) -> float:
    """Scale of the random fluctuations that minibatch sampling adds to SGD.

    g = ε N / (B (1 - m)), the leading order of ε/(1-m) · (N/B - 1) for B ≪ N. It is the
    quantity that growing the batch and decaying the learning rate lower alike.

    Args:
        lr: learning rate ε, > 0.
        momentum: m, in [0, 1).
        global_batch: B, samples per update.
        num_samples: N, size of the training set.

    Source: Smith & Le 2017 (arXiv 1710.06451); Smith et al. 2018 (arXiv 1711.00489), §2 and §4.
    """
    return lr * num_samples / (global_batch * (1 - momentum))


def lr_for_noise(noise: float, momentum: float, global_batch: int, num_samples: int) -> float:
    """The learning rate at which `noise_scale` is `noise`: its inverse in ε."""
    return noise * global_batch * (1 - momentum) / num_samples
