"""Compute the gradients of micro-batches again, without changing the update in progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from hvd_batchgrow.data.tensor_tree import map_tensors
from hvd_batchgrow.nn.keyed_random import set_sample_keys
from hvd_batchgrow.train.update.bucket import Bucket
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.update.local_sums import LocalSums, sketch
from hvd_batchgrow.train.update.rounding_noise import Noise
from hvd_batchgrow.train.update.totals import Share


def recompute(
    engine: UpdateEngine, micro_batches: Iterable[MicroBatch], factor: float, noise: Noise | None = None
) -> LocalSums:
    """Return what a rank with these micro-batches computes in the update in progress, before the all-reduce.

    Call it between the backward passes of an update and its optimizer step, as `check` of `UpdateEngine.update`.
    Weights, gradients, buffers and random generators are the same before and after.

    Args:
        engine: of the update.
        micro_batches: of the rank, in order.
        factor: on the loss of each sample, as `check` gets it.
        noise: is added to inputs, weights and gradients; None: no noise.
    """
    share, noise = Share(stop=False, exact=engine.exact), noise or Noise(0.0, 0)
    buckets = engine.buckets.empty_copies()
    device = engine.device
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type),
        noise.on_weights(engine.model),
        _as_gradients(buckets),
    ):
        for micro_batch in micro_batches:
            engine.changing.restore()
            set_sample_keys(engine.keyed_modules, micro_batch.keys, device)
            noisy = replace(micro_batch, inputs=map_tensors(noise, micro_batch.inputs))
            loss, _ = share.add(micro_batch, engine.forward(engine.model, noisy))
            engine.changing.after_forward(())
            (loss * factor if engine.loss_scale else loss).backward()
            for bucket in buckets:
                _add(bucket, noise)
    for norm in engine.norms:
        norm.forget()
    return LocalSums.of(share, [sketch(bucket.local_sum) for bucket in buckets])


@contextmanager
def _as_gradients(buckets: Sequence[Bucket]) -> Iterator[None]:
    """Make the slices of buckets the gradients of their parameters, and restore the earlier gradients at the end."""
    members: list[nn.Parameter] = [parameter for bucket in buckets for parameter in bucket.members]
    before = [parameter.grad for parameter in members]
    for parameter, slice_ in zip(members, (part for bucket in buckets for part in bucket.slices), strict=True):
        parameter.grad = slice_
    try:
        yield
    finally:
        for parameter, gradient in zip(members, before, strict=True):
            parameter.grad = gradient


def _add(bucket: Bucket, noise: Noise) -> None:
    """After a backward pass, add its gradients to the sum, in the same order as `GradientBuckets` does."""
    for place in range(len(bucket.members)):
        bucket.restore(place)
    bucket.flat.copy_(noise(bucket.flat))
    if bucket.exact or bucket.is_half:
        bucket.set_aside()
