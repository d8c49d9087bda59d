"""The plan: a job compiled for a number of ranks. `plan` prints it and `train` runs it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.split import num_validation
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.layout import Layout
from hvd_batchgrow.schedule.phases import Phase, Schedule, Warmup, compile_schedule
from hvd_batchgrow.schedule.rounding import samples_at
from hvd_batchgrow.schedule.stage_layouts import ChooseRanks
from hvd_batchgrow.schedule.stages import Start
from hvd_batchgrow.schedule.trigger import trigger_of
from hvd_batchgrow.schedule.validation.growth_notes import growth_notes
from hvd_batchgrow.schedule.validation.job_check import check_job, one_gradient
from hvd_batchgrow.schedule.validation.unlikely_values import unlikely_values


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before it starts."""

    job: Job
    num_samples: int
    """N, of the samples to train on."""
    schedule: Schedule
    layouts: tuple[Layout, ...]
    """One per phase."""
    start: Start
    num_ranks: int
    """Available ranks."""
    decisions: tuple[Decision, ...] = ()
    """Decisions of the trigger so far; the schedule includes them and later ones may change it."""

    @property
    def ghost_batch(self) -> int:
        """γ: samples of one ghost batch of the stream."""
        return self.job.model.ghost_batch

    @property
    def num_validation(self) -> int:
        """Samples that are held out of training for validation; N does not include them."""
        return num_validation(self.job.data)

    @property
    def num_updates(self) -> int:
        """Updates of the whole run."""
        return self.schedule.num_updates

    @property
    def trained_phases(self) -> list[tuple[int, Phase, Layout]]:
        """Number, from 1, phase and layout of each phase with updates: an update may jump over a whole phase."""
        phases = zip(self.schedule.phases, self.layouts, strict=True)
        return [(k, phase, layout) for k, (phase, layout) in enumerate(phases, start=1) if phase.num_updates]

    @property
    def peak_ranks(self) -> int:
        """The most ranks that any update uses."""
        return max(layout.ranks for _, _, layout in self.trained_phases)

    def ranks_at(self, samples: int) -> int:
        """Return the ranks of the update that starts at a sample counter."""
        return self.layouts[self.schedule.index_at(samples)].ranks

    @property
    def milestones(self) -> set[int]:
        """Sample counters whose checkpoints are kept: those of `Schedule.milestones` without mere changes of the gain.

        With AdaScale there may be hundreds of these. Where the learning rate changes by another factor, a gain and a
        boundary of the learning rate coincide.
        """
        schedule, kept = self.schedule, self.schedule.milestones
        gains = self.decisions if self.job.trigger.scales_progress else ()
        for decision in gains:
            if decision.samples >= schedule.end_samples:
                break
            before, now = (schedule.phases[schedule.index_at(decision.samples - k)].lr for k in (1, 0))
            if math.isclose(now / before, decision.new_lr / decision.old_lr, rel_tol=1e-9):
                kept.discard(decision.samples)
        return kept

    @property
    def notes(self) -> list[str]:
        """Lines that the user should read before the run."""
        num_samples, phases = self.num_samples, self.schedule.phases
        return [
            *([] if self.decisions else growth_notes(self.job, self.start, phases)),
            *([] if self.decisions or not self.job.is_adaptive else trigger_of(self.job).notes(self.job, self.start)),
            *unlikely_values(self.job, num_samples, phases),
            *self._rank_notes(),
            *self._noise_notes(),
        ]

    def noise_scale(self, phase: Phase) -> float:
        """Return the noise scale g of a phase."""
        return self.start.noise_after_rule.of(phase.lr, phase.momentum, phase.global_batch)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `plan --json` prints them."""
        return {
            "job": self.job.name,
            "num_samples": self.num_samples,
            "num_validation": self.num_validation,
            "num_updates": self.num_updates,
            "end_samples": self.schedule.end_samples,
            "ghost_batch": self.ghost_batch,
            "notes": self.notes,
            "warmup_samples": self.schedule.warmup.end_samples,
            "job_file": self.job.model_dump(mode="json", exclude_none=True),
            "phases": [
                self._phase_to_dict(phase, layout)
                for phase, layout in zip(self.schedule.phases, self.layouts, strict=True)
            ],
        }

    def _rank_notes(self) -> list[str]:
        """Return the phases with idle ranks and what would use the ranks, and keys that need more ranks."""
        layout, found = self.job.layout, []
        if layout.grow_by == "ranks" and not layout.ranks_per_phase:
            steps = itertools.pairwise(self.trained_phases)
            lost = [_ranks_lost(k, before.ranks, now.ranks, phase, self) for (_, _, before), (k, phase, now) in steps]
            found = [note for note in lost if note]
        stated = self.peak_ranks if layout.ranks_per_phase else layout.max_ranks or 0
        if stated > self.num_ranks:
            key = "layout.ranks_per_phase needs" if layout.ranks_per_phase else "layout.max_ranks ="
            found.append(f"{key} {stated}, but the run has {counted(self.num_ranks, 'rank')} (--ranks)")
        return found

    def _noise_notes(self) -> list[str]:
        """Return the batches at which the gradient noise cannot be measured."""
        noise = self.job.gradient_noise
        if not noise.measure:
            return []
        if noise.estimator == "norm_layers":
            return self._norm_layer_notes()
        phases = self.trained_phases
        batches = [p.global_batch for _, p, layout in phases if layout.ranks * layout.accumulation == 1]
        reasons = [str(one_gradient(self.job, batch)) for batch in sorted(set(batches))]
        return [f"gradient_noise.measure: an update of one micro-batch is not measured; {why}" for why in reasons]

    def _norm_layer_notes(self) -> list[str]:
        """Return the note on updates of one ghost batch, in which ghost norms have no second gradient."""
        if all(phase.global_batch > self.ghost_batch for phase in self.schedule.phases if phase.num_updates):
            return []
        return [
            f"gradient_noise.measure: an update of one ghost batch ({self.ghost_batch} samples) is not measured if the "
            "network has batch norms; use a smaller model.ghost_batch"
        ]

    def _phase_to_dict(self, phase: Phase, layout: Layout) -> dict[str, Any]:
        values = asdict(phase) | asdict(layout) | {"noise_scale": self.noise_scale(phase)}
        unused: dict[str, Any] = {"beta2": None, "eps": None, "weight_decay_factor": None}
        unused |= {"progress_rate": 1.0, "continues_phase": False}
        return {key: value for key, value in values.items() if key not in unused or value != unused[key]}


def compile_plan(
    job: Job,
    ranks: int,
    num_samples: int,
    choose_ranks: ChooseRanks | None = None,
    decisions: Sequence[Decision] = (),
) -> Plan:
    """Compile a job for a number of ranks.

    Args:
        job: the job.
        ranks: R >= 1, available ranks.
        num_samples: N, size of the training set.
        choose_ranks: returns the ranks of each phase for layout.grow_by = "auto", from measured costs.
        decisions: decisions that the trigger of an adaptive schedule has made.

    Raises:
        JobError: something cannot be formed; has all faults, with the arithmetic and the nearest valid values.
    """
    start, stages, epochs, layouts = check_job(job, ranks, num_samples, choose_ranks, decisions)
    section = job.schedule
    warmup = Warmup(samples_at(section.warmup_epochs, num_samples), section.warmup_start_lr, stages[0].lr)
    schedule = compile_schedule(stages, epochs, num_samples, warmup)
    return Plan(job, num_samples, schedule, layouts, start, ranks, tuple(decisions))


def _ranks_lost(k: int, before: int, now: int, phase: Phase, plan: Plan) -> str | None:
    """Return a note if a batch is large enough for the ranks of the phase before but not divisible by them."""
    ghost_batch, batch = plan.ghost_batch, phase.global_batch
    if now >= before or batch < before * plan.job.micro_batch_limit:
        return None
    lower = batch // (before * ghost_batch) * before * ghost_batch
    nearest = f"nearest for {before} ranks: {lower}, {lower + before * ghost_batch}; or layout.uneven_ranks = true"
    arithmetic = f"batch {batch} = {batch // ghost_batch} ghost batches of {ghost_batch}"
    return f"phase {k} has {now} rank{'s' * (now > 1)}, the one before has {before}: {arithmetic}; {nearest}"
