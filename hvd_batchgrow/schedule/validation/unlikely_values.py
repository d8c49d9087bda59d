"""Warn before the run about valid values that are rarely intended. `key_faults` refuses impossible values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.optim import AdamSection, LarsSection
from hvd_batchgrow.config.split import may_have_validation
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.trigger import trigger_of

_LARGE_LR = {"sgd": 10.0, "adam": 0.1, "adamw": 0.1, "lars": 100.0}
"""Above any published value that we know of: LARS reaches about 50 at a batch of 32k."""
_MANY_EPOCHS = 10_000
_FAST_DECAY = 100
"""Updates."""
_SHORT_TIMEOUT_S = 10.0


def unlikely_values(job: Job, num_samples: int, phases: Sequence[Phase]) -> list[str]:
    """Return a line for each unlikely value, with its key and what was probably meant.

    Args:
        job: the job.
        num_samples: N.
        phases: the job's compiled phases.
    """
    num_updates = sum(phase.num_updates for phase in phases)
    return [
        *_of_optimizer(job, num_updates),
        *_of_momentum(job, phases),
        *_of_network(job),
        *_of_lengths(job, num_samples, phases[0].global_batch),
        *trigger_of(job).unlikely_values(),
        *_of_selection(job),
    ]


def _of_momentum(job: Job, phases: Sequence[Phase]) -> Iterator[str]:
    if getattr(job.optim, "rescale_momentum", False) and len({phase.momentum for phase in phases}) == 1:
        from_start = "; raise_momentum_to holds from the start" if job.schedule.raise_momentum_to else ""
        yield (
            f"optim.rescale_momentum has no effect, because the momentum never changes{from_start}; "
            "schedule.momenta changes it at boundaries"
        )


def _of_optimizer(job: Job, num_updates: int) -> Iterator[str]:
    optim = job.optim
    if optim.lr > _LARGE_LR[optim.name]:
        yield f"optim.lr = {optim.lr:g} is unusually large for {optim.name!r}"
    memory = 1 / (1 - optim.momentum)
    if optim.momentum > 0.99 and memory > num_updates:
        yield (
            f"{optim.momentum_key} = {optim.momentum:g} averages gradients over {memory:,.0f} updates, "
            f"and the run has {num_updates:,}"
        )
    if isinstance(optim, AdamSection) and optim.betas[1] < optim.momentum:
        yield f"optim.betas[1] = {optim.betas[1]:g} is below optim.betas[0] = {optim.momentum:g}: are they swapped?"
    if isinstance(optim, (AdamSection, LarsSection)) and optim.eps > 1:
        yield f"optim.eps = {optim.eps:g} is far above a gradient's size: hardly any step is left; 1e-8 is usual"
    if isinstance(optim, LarsSection):
        if optim.trust_coefficient > 1:
            yield f"optim.trust_coefficient = {optim.trust_coefficient:g} is unusually large; 0.001 is usual"
    elif optim.name != "adam" and (product := optim.weight_decay * optim.lr) > 0:
        halved = math.log(0.5) / math.log1p(-product) if product < 1 else 0
        if halved < min(_FAST_DECAY, num_updates):
            yield (
                f"optim.weight_decay = {optim.weight_decay:g} × lr = {optim.lr:g} alone halves the weights "
                f"in {counted(max(1, round(halved)), 'update')}"
            )
    if job.task.label_smoothing > 0.5:
        share = job.task.label_smoothing
        yield f"task.label_smoothing = {share:g} spreads {share:.0%} of each target over all classes; 0.1 is usual"


def _of_network(job: Job) -> Iterator[str]:
    model = job.model
    if model.bn_momentum > 0.5:
        yield (
            f"model.bn_momentum = {model.bn_momentum:g} is the weight of the newest ghost batch in the running "
            f"statistics; a weight of {1 - model.bn_momentum:.4g} is what TensorFlow calls {model.bn_momentum:g}"
        )
    if model.dropout > 0.8:
        yield f"model.dropout = {model.dropout:g} is the share that is dropped; to keep it: {1 - model.dropout:.4g}"
    if model.shakedrop > 0.8:
        yield (
            f"model.shakedrop = {model.shakedrop:g} is the probability that a sample is perturbed in the last block; "
            f"for the paper's p_L = {model.shakedrop:g}: {1 - model.shakedrop:.4g}"
        )


def _of_selection(job: Job) -> Iterator[str]:
    if job.trigger.restores_best and not may_have_validation(job.data):
        yield (
            "trigger.restore_best = true selects weights by results on the test set, so those at the end are no longer "
            "a test: set data.validation_fraction, such as 0.1"
        )


def _of_lengths(job: Job, num_samples: int, batch: int) -> Iterator[str]:
    section = job.schedule
    if section.epochs >= _MANY_EPOCHS:
        yield f"schedule.epochs = {section.epochs:g} counts passes over the training set, not updates"
    if section.warmup_epochs > section.epochs / 2:
        yield f"schedule.warmup_epochs = {section.warmup_epochs:g} is more than half of epochs = {section.epochs:g}"
    for key, every in (("evaluation", job.evaluation.every_epochs), ("checkpoint", job.checkpoint.every_epochs)):
        if every * num_samples < batch:
            yield f"{key}.every_epochs = {every:g} is less than an update: there is one after each"
    if job.logging.stall_timeout_s < _SHORT_TIMEOUT_S:
        yield f"logging.stall_timeout_s = {job.logging.stall_timeout_s:g}: any step that takes longer ends the job"
    if job.update.ema_samples is not None and job.update.ema_samples < batch:
        memory = job.update.ema_samples
        yield f"update.ema_samples = {memory:g} is less than a batch: the average hardly differs from the weights"
