"""`policy = "steps"`."""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import LrRuleKeys
from hvd_batchgrow.config.types import PositiveInt
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.batch_steps import check_batch_steps, parse_batch_steps
from hvd_batchgrow.schedule.policy import POLICIES, Policy
from hvd_batchgrow.schedule.rounding import samples_at
from hvd_batchgrow.schedule.stages import Stage, Start


@POLICIES.add
class StepsSchedule(LrRuleKeys, Policy):
    """Set the batch at given sample counts; the learning rate is constant or follows `lr_rule`."""

    policy: Literal["steps"]
    batch_steps: Annotated[str, AfterValidator(check_batch_steps)]
    """Pairs SAMPLES:BATCH such as "0:768 250K:1536". K, M, B and T are 10³, 10⁶, 10⁹ and 10¹²."""
    batch_steps_unit: Literal["samples", "tokens"] = "samples"
    """What `batch_steps` counts. Megatron-LM counts tokens if it knows the sequence length."""
    sequence_length: PositiveInt | None = None
    """For tokens: tokens of one sample. Counts are divided by it and rounded down to whole samples."""

    states_batches: ClassVar[bool] = True

    @property
    def first_batch(self) -> int:
        return self.pairs[0][1]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The sample counts, each with the batch from there on."""
        return parse_batch_steps(self.batch_steps, self.sequence_length or 1)

    def stages(self, start: Start) -> list[Stage]:
        pairs = self.pairs
        counts = [samples for samples, _ in pairs]
        if any(b <= a for a, b in itertools.pairwise(counts)):
            length = self.sequence_length
            divided = f" (tokens / sequence_length = {length}, rounded down)" if length else ""
            fault = f"{self.batch_steps!r} must rise, and begins its steps at samples {counts}{divided}"
            raise JobError([Fault("schedule.batch_steps", fault)])
        num_samples = start.noise.num_samples
        total = samples_at(self.epochs, num_samples)
        if counts[-1] >= total:
            fault = f"the last step, at {counts[-1]} samples, is not before the end of the run at {total}"
            remedy = f"remove it, or use schedule.epochs above {counts[-1] / num_samples:.6g}"
            raise JobError([Fault("schedule.batch_steps", f"{fault}; {remedy}")])
        return [Stage(at / num_samples, start.lr, start.momentum, batch, float(batch)) for at, batch in pairs]

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        given = {"lr_scale": self.lr_scale != 1, "raise_momentum_to": self.raise_momentum_to is not None}
        own = {"lr_scale": "optim.lr", "raise_momentum_to": job.optim.momentum_key}
        fault = "starts with a larger batch, but batch_steps sets every batch"
        faults = [Fault(f"schedule.{key}", f"{fault}; change {own[key]}") for key in given if given[key]]
        counts_tokens = self.batch_steps_unit == "tokens"
        if counts_tokens and self.sequence_length is None:
            faults.append(
                Fault("schedule.sequence_length", "batch_steps_unit = 'tokens' needs it: tokens of one sample")
            )
        if self.sequence_length is not None and not counts_tokens:
            fault = "is for batch_steps_unit = 'tokens', not 'samples'; remove it, or change the unit"
            faults.append(Fault("schedule.sequence_length", fault))
        context = job.data.context
        if counts_tokens and context is not None and self.sequence_length not in {None, context}:
            fault = f"{self.sequence_length}, but a sample has data.context = {context} tokens; use {context}"
            faults.append(Fault("schedule.sequence_length", fault))
        return faults

    def stated_batches(self, cap: int | None) -> list[tuple[str, int]]:
        return [("schedule.batch_steps", batch) for _, batch in self.pairs]
