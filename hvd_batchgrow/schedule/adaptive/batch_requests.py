"""What a trigger requests, and the decision that is formed from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.stages import Stage, Start, make_start


@dataclass(frozen=True)
class BatchRequest:
    """What a trigger requests: one of `batch`, `noise_factor` and `gain`."""

    why: str
    batch: float | None = None
    """B in samples, at the same learning rate."""
    most: float | None = None
    """Limit that rounding must not exceed, in samples. None: `schedule.max_batch`."""
    noise_factor: float | None = None
    """Divisor of the noise scale g: the batch grows up to its limit, then the learning rate decays."""
    gain: float | None = None
    """AdaScale's r: the learning rate as a multiple of the job's learning rate; the batch is constant."""


def form_decision(
    job: Job,
    num_samples: int,
    decisions: Sequence[Decision],
    samples: int,
    request: BatchRequest,
    measured: Mapping[str, Any],
) -> Decision | None:
    """Return the decision for a request, or None if rounding leaves batch and learning rate unchanged.

    A batch is a whole multiple of `schedule.batch_multiple` and at most `schedule.max_batch`. As in every policy, the
    learning rate corrects for the rounding, so that the noise scale is the requested one. If the noise scale is to
    fall, it also corrects for the limit. With an `lr_rule` it corrects for neither, because κ of the rule follows the
    formed batch. It still falls if the noise scale is to fall and the batch cannot grow, and returns when the batch
    grows by as much instead.

    Args:
        job: a job with an adaptive schedule.
        num_samples: N.
        decisions: the decisions so far.
        samples: sample counter.
        request: the trigger's request.
        measured: the measurements that led to it.
    """
    start = make_start(job, num_samples)
    batch, lr = (decisions[-1].new_batch, decisions[-1].new_lr) if decisions else (start.global_batch, start.lr)
    formed, wanted = _formed(start, batch, lr, request, has_rule=job.schedule.rule != "none")
    moves_lr_alone = formed.global_batch == batch
    # If a batch was requested, a change of the learning rate alone would only follow the measurement's error.
    if moves_lr_alone and (request.batch is not None or math.isclose(formed.lr, lr, rel_tol=1e-3)):
        return None
    return Decision(
        samples=samples,
        trigger=job.trigger.name,
        why=request.why,
        old_batch=batch,
        new_batch=formed.global_batch,
        wanted_batch=wanted,
        old_lr=lr,
        new_lr=formed.lr,
        measured=dict(measured),
    )


def _formed(start: Start, batch: int, lr: float, request: BatchRequest, *, has_rule: bool) -> tuple[Stage, float]:
    """Return the nearest stage that can be formed, and the requested batch."""
    noise, momentum = start.noise, start.momentum
    if request.gain is not None:
        return Stage(0.0, start.lr * request.gain, momentum, batch, float(batch)), float(batch)
    if request.noise_factor is not None:
        target = noise.of(lr, momentum, batch) / request.noise_factor
        wanted = noise.batch_for(target, momentum, start.lr)
        formed = start.stage(0.0, target, momentum, wanted)
        # `wanted` is for the first learning rate: growth takes the place of all earlier decays.
        lr_before_rule = start.lr if formed.global_batch > batch else lr / request.noise_factor
        return (replace(formed, lr=lr_before_rule) if has_rule else formed), wanted
    assert request.batch is not None
    limited = min(request.batch, start.max_batch or start.noise.num_samples / 2)
    if request.most is not None:
        most = start.whole(request.most)
        start = replace(start, max_batch=min(most, start.max_batch or most))
    formed = start.stage(0.0, noise.of(start.lr, momentum, limited), momentum, limited)
    return (replace(formed, lr=lr) if has_rule else formed), request.batch
