"""Measurements of a run, and the decisions of its trigger: made now, in an earlier attempt, or in a replayed run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hvd_batchgrow.comm.broadcast_object import map_state
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest, form_decision
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.schedule.rounding import period_ends
from hvd_batchgrow.schedule.trigger import NO_EVIDENCE, Evidence, Measurement, TriggerRule, bounded, make_trigger
from hvd_batchgrow.schedule.triggers.branch import BranchRule
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.train.measured_noise import MeasuredNoise
from hvd_batchgrow.train.moving_average import MovingAverage
from hvd_batchgrow.train.run.decision_record import open_decisions, write_decisions
from hvd_batchgrow.train.update.engine import UpdateResult
from hvd_batchgrow.train.update.gradient_noise import GradientNoiseScale, NormLayers
from hvd_batchgrow.train.update.gradient_norms import ALL
from hvd_batchgrow.train.update.weight_average import WeightAverage


class GrowthController:
    """Averages the measurements of updates, and makes or replays the decisions of a trigger.

    All ranks keep the same state, so any of them can resume from it. Only rank 0 decides.

    Args:
        job: names the measurements and the trigger.
        num_samples: N.
        model: the model whose best weights may be kept.
        average: the average of its weights, which is kept and restored with them; None: the job keeps no average.
    """

    def __init__(self, job: Job, num_samples: int, model: nn.Module, average: WeightAverage | None = None) -> None:
        self._job, self._num_samples, self._model, self._average = job, num_samples, model, average
        self._trigger: TriggerRule | None = make_trigger(job, num_samples) if job.is_adaptive else None
        self._noise = MeasuredNoise(job.gradient_noise, num_samples)
        self._loss = MovingAverage(job.gradient_noise.ema_epochs * num_samples)
        self._best: dict[str, Any] = {}
        self._best_average: dict[str, Tensor] = {}
        self.decisions: tuple[Decision, ...] = ()
        """All known decisions; some, made by an earlier attempt, may be ahead of the sample counter."""
        self.replayed_from: str | None = None
        """File of decisions that this run follows; it then makes no others."""

    @property
    def measures_noise(self) -> bool:
        """Whether updates must measure the gradient noise."""
        needed = self._job.trigger.measures_gradients and self.replayed_from is None
        return self._job.gradient_noise.measure or needed

    @property
    def branch_rule(self) -> BranchRule | None:
        """The rule of a trigger that trains branches; None: the job has another one, or the run is a replay."""
        return self._trigger if isinstance(self._trigger, BranchRule) else None

    @property
    def round_at(self) -> int | None:
        """Sample counter at which branches are to be trained before the next update; None: no branches are due."""
        return self.branch_rule.state.round_at if self.branch_rule else None

    def plan_round(self, before: int, plan: Plan, samples: int) -> bool:
        """After an update, return whether branches are trained before the next one; see `BranchRule.plan_round`.

        No branch is trained at or before a decision that is on record.
        """
        rule = self.branch_rule
        if rule is None or not rule.plan_round(before, samples, self._batch_before(plan, samples)):
            return False
        if self.is_decided(samples):
            self.end_round(plan, samples)
            return False
        return True

    def end_round(self, plan: Plan, samples: int) -> None:
        """Count the branches from a sample counter; see `BranchRule.end_round`."""
        assert self.branch_rule is not None
        self.branch_rule.end_round(self._batch_before(plan, samples))

    def _batch_before(self, plan: Plan, samples: int) -> int:
        """Return the batch at a sample counter before any decision there."""
        made = next((decision for decision in self.decisions if decision.samples == samples), None)
        return made.old_batch if made else plan.schedule.at(samples).global_batch

    def is_decided(self, samples: int) -> bool:
        """Return whether an earlier attempt has decided here or later."""
        return bool(self.decisions) and samples <= self.decisions[-1].samples

    def is_due(self, before: int, samples: int) -> bool:
        """Return whether the trigger looks between two sample counters, in addition to evaluations and boundaries."""
        every_epochs = getattr(self._job.trigger, "every_epochs", None)
        windows = getattr(self._job.trigger, "windows_epochs", None) or ()
        epoch_before, epoch = before / self._num_samples, samples / self._num_samples
        return any(epoch_before < latest <= epoch for _, latest in windows) or (
            every_epochs is not None and period_ends(before, samples, every_epochs, self._num_samples)
        )

    @property
    def noise(self) -> dict[str, GradientNoiseScale]:
        """Known noise scales of the whole gradient and of layer groups, by name."""
        return self._noise.scales

    @property
    def norm_layers(self) -> NormLayers | None:
        """The calibration of the norm layers' noise; None: it is not measured."""
        return self._noise.norm_layers

    def add(self, result: UpdateResult, samples: int) -> None:
        """Add the measurements of an update of `samples` samples."""
        if result.skipped:
            return
        self._loss.add(result.loss_sum / result.weight, samples)
        self._noise.add(result, samples)

    def look(
        self,
        ranks: Ranks,
        plan: Plan,
        samples: int,
        metrics: Mapping[str, float],
        folder: Path,
        branches: Evidence = NO_EVIDENCE,
    ) -> Decision | None:
        """Between two updates, decide or follow the known decisions. All ranks call it together.

        A new decision is on disk before any rank acts on it.

        Args:
            ranks: the ranks that train.
            plan: compiled from the decisions so far.
            samples: sample counter.
            metrics: of an evaluation at this sample counter; empty: no evaluation.
            folder: the run folder.
            branches: what branches from here have shown, as `Measurement` holds it; only rank 0 knows it.

        Returns:
            The decision that takes effect here; None: nothing changes.

        Raises:
            CollectiveError: the decision cannot be written.
        """
        if self._trigger is None:
            return self._follow(samples)

        def decide() -> bytes:
            now = replace(self._now(plan, samples, metrics), branches=branches[0], branches_text=branches[1])
            request = self._run_trigger(now)
            decision = None if self.is_decided(samples) else self._decide(request, now, folder)
            return dump_json({"now": asdict(now), "decision": decision}).encode()

        message = json.loads(ranks.broadcast_from_rank0(decide, "decision"))
        if ranks.rank != 0:
            self._run_trigger(Measurement(**message["now"]))
        if message["decision"] is not None:
            self.decisions = (*self.decisions, Decision.from_dict(message["decision"]))
        return self._follow(samples)

    def _run_trigger(self, now: Measurement) -> BatchRequest | None:
        """Give the trigger rank 0's measurements, so that all ranks keep the same best weights."""
        assert self._trigger is not None
        request = self._trigger.look(now)
        if self._job.trigger.restores_best:
            self._keep_best(now.samples, [self._trigger.best_samples])
        return request

    def _decide(self, request: BatchRequest | None, now: Measurement, folder: Path) -> dict[str, Any] | None:
        """On rank 0, form a decision, write it to disk and return it; None: nothing changes."""
        job, num_samples, num_decisions = self._job, self._num_samples, len(self.decisions)
        # At the end of a window the batch grows even if the request leads to no other batch.
        for wanted in (request, None):
            bound = bounded(wanted, job, num_samples, num_decisions, now)
            decision = bound and form_decision(job, num_samples, self.decisions, now.samples, bound, now.numbers())
            if decision:
                if self._job.trigger.restores_best and self._best:
                    decision = replace(decision, restore_samples=self._trigger.best_samples)  # type: ignore[union-attr]
                write_decisions(folder, None, (*self.decisions, decision))
                return decision.to_dict()
        return None

    def _now(self, plan: Plan, samples: int, metrics: Mapping[str, float]) -> Measurement:
        phase = plan.schedule.at(samples)
        noise = self.noise.get(ALL)
        metric = metrics.get(self._job.trigger.test_metric or "")
        # If the loss is NaN, the metrics are meaningless too. A metric alone is NaN if its count is 0.
        was_unusable = not all(map(math.isfinite, (metrics.get("loss", 0.0), metric or 0.0)))
        return Measurement(
            samples,
            phase.global_batch,
            phase.lr,
            noise.trace if noise else None,
            noise.squared_norm if noise else None,
            self._loss.value,
            None if was_unusable else metric,
            was_unusable,
            norm_layers_factor=layers.factor if (layers := self.norm_layers) else None,
        )

    def _follow(self, samples: int) -> Decision | None:
        """Apply and return the decision at this sample counter, if there is one."""
        if self._trigger is None:  # a replay knows in advance which weights it will restore
            self._keep_best(samples, [d.restore_samples for d in self.decisions if d.samples > samples])
        decision = next((decision for decision in self.decisions if decision.samples == samples), None)
        if decision is not None:
            if self._trigger is not None:
                self._trigger.decided(decision)
            if decision.restore_samples is not None and self._best:
                self._model.load_state_dict(self._best)
                if self._average and self._best_average:
                    self._average.load_state_dict(self._best_average)
        return decision

    def _keep_best(self, samples: int, wanted: Iterable[int | None]) -> None:
        if samples in wanted:
            average = self._average.state_dict() if self._average else {}
            copied = map_state(lambda tensor: tensor.detach().clone(), (self._model.state_dict(), average))
            self._best, self._best_average = copied

    def state(self) -> dict[str, Any]:
        """Return plain values and tensors for a checkpoint."""
        return {
            "decisions": [decision.to_dict() for decision in self.decisions],
            "replayed_from": self.replayed_from,
            "trigger": self._trigger.state.model_dump() if self._trigger else {},
            "noise": self._noise.state(),
            "loss": self._loss.state(),
            "best": self._best,
            "best_average": self._best_average,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`; an empty one, from a run that measured nothing, changes nothing."""
        if not state:
            return
        if self._job.is_adaptive:
            self.decisions = tuple(map(Decision.from_dict, state["decisions"]))
            self._set_replay(state["replayed_from"])
        if self._trigger and state["trigger"]:
            self._trigger.load(state["trigger"])
        self._noise.load(state["noise"])
        self._loss.load(state["loss"])
        self._best, self._best_average = dict(state["best"]), dict(state["best_average"])

    def open(self, folder: Path, ranks: Ranks, plan: Plan, samples: int, replay: Path | None) -> list[str]:
        """Before the first update, read the recorded decisions; see `open_decisions`. Return notes for the user."""
        if not self._job.is_adaptive:
            return []
        known = self.replayed_from, self.decisions
        source, self.decisions, notes = open_decisions(folder, ranks, plan, samples, replay, known)
        self._set_replay(source)
        return notes

    def _set_replay(self, source: str | None) -> None:
        self.replayed_from = source
        if source is not None:
            self._trigger = None
