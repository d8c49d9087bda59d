"""The training loop: updates, records, evaluations, decisions and checkpoints, each due at a sample count."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from hvd_batchgrow.comm.hardware import Hardware, hardware_of
from hvd_batchgrow.comm.ranks import CollectiveError, Ranks, RanksLost
from hvd_batchgrow.data.order.stream import micro_batches_of_rank
from hvd_batchgrow.data.pipeline.reader import GhostBatchStream
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.optim.lars import median_trust_ratio
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.rounding import period_ends
from hvd_batchgrow.schedule.trigger import NO_EVIDENCE, Evidence
from hvd_batchgrow.train.branch_rounds import BranchRounds
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.train.checkpoints.writer import CheckpointWriter, host_copy
from hvd_batchgrow.train.evaluate import evaluate
from hvd_batchgrow.train.events import (
    BranchesCompared,
    Decided,
    EvaluatedSet,
    Evaluation,
    Observer,
    ObserverList,
    RunEnded,
    UpdateDone,
)
from hvd_batchgrow.train.liveness.stop import Stop
from hvd_batchgrow.train.liveness.watchdog import IDLE, Watchdog
from hvd_batchgrow.train.metric_window import MetricWindow
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.precise_bn import reestimate
from hvd_batchgrow.train.rank_subsets import ranks_of_phase
from hvd_batchgrow.train.replay_check import ReplayCheck
from hvd_batchgrow.train.run.plan_for_ranks import plan_to_write
from hvd_batchgrow.train.run.run_folder import write_plan
from hvd_batchgrow.train.start_and_end import ended_at, started
from hvd_batchgrow.train.train_state import TrainState
from hvd_batchgrow.train.update.engine import UpdateResult
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.update.micro_batches import ghost_batches_per_micro_batch, read_micro_batches
from hvd_batchgrow.train.update.non_finite import NonFinite, describe, describe_evaluation
from hvd_batchgrow.train.weights_agree import check_agreement


class Trainer:
    """Trains a run from its first update or from a checkpoint until its end or a stop.

    Args:
        parts: network, optimizer, update engine and data of this rank.
        plan: compiled from the job for these ranks.
        ranks: the processes that train together.
        folder: the run folder, into which rank 0 writes.
        observers: receive the events of the run; empty on all ranks but rank 0.
        shown: the plan to write, from `plan_for_ranks`; None: `plan`.
        hardware: devices of all ranks, for the observers; None: described as far as this rank knows.
        elastic: what the attempts of an elastic run share; receives the state of this rank if ranks are lost.
        max_updates: stop after this number of updates, counted over these attempts.
        end_samples: end of a phase at which this attempt ends; None: the end of the run.
        is_branch: whether this run is a branch that another run trains in a pause: that run's watchdog watches it, and
            it evaluates nothing.
    """

    def __init__(
        self,
        parts: TrainingParts,
        plan: Plan,
        ranks: Ranks,
        folder: Path,
        observers: Sequence[Observer],
        *,
        shown: Plan | None = None,
        hardware: Hardware | None = None,
        elastic: ElasticState | None = None,
        max_updates: int | None = None,
        end_samples: int | None = None,
        is_branch: bool = False,
    ) -> None:
        self.parts, self.plan, self.ranks, self.folder = parts, plan, ranks, folder
        self.shown = shown or plan
        self.job, self.hardware = parts.job, hardware or hardware_of(ranks, parts.device)
        self.observers = ObserverList(observers, folder)
        self.elastic, self.max_updates, self.end_samples = elastic or ElasticState(), max_updates, end_samples
        self.is_branch = is_branch
        self.rounds: BranchRounds | None = None
        """Trains the branches of this run; None: its trigger trains none."""
        self.state = TrainState(parts)
        self._before_work: Checkpoint | None = None
        """The state after the last update, while an elastic run evaluates, decides or re-estimates after it."""
        self.team = ranks
        """The ranks that train the current phase."""
        self.replay_check = ReplayCheck(parts, ranks, self.state, folder)
        self.writer = CheckpointWriter(folder / "checkpoints", self.job.checkpoint.keep, plan.milestones)

    def run(
        self, stop: Stop, checkpoint: Checkpoint | None = None, notes: Sequence[str] = (), replay: Path | None = None
    ) -> RunEnded:
        """Train to the end, or until a stop is requested of any rank.

        Args:
            stop: reports whether a stop is requested of this rank.
            checkpoint: the checkpoint to resume; None: start from the first update.
            notes: notices for the observers.
            replay: decisions to follow, without making others; None: follow those of the run and its trigger.

        Raises:
            CollectiveError: training has failed on a rank, or the decisions cannot be replayed.
            RunError: a checkpoint cannot be written.
            RanksLost: in an elastic job, ranks were lost; `elastic` then has the state after the last update.
        """
        watched = (self.ranks, self.parts.heartbeat, self.job.logging.stall_timeout_s)
        with nullcontext() if self.is_branch else Watchdog(*watched), self.writer:
            notes = [*notes, *self._restore(checkpoint, replay)]
            self.observers.notify("on_start", started(self, notes))
            try:
                self._train_phases(stop)
            except RanksLost:  # before the start, there is nothing to keep that the next attempt does not have
                self._keep_for_next_attempt()
                raise
        ended = ended_at(self, self._end)
        self.observers.notify("on_end", ended)
        return ended

    def _train_phases(self, stop: Stop) -> None:
        """Train until this attempt ends, each phase on its ranks."""
        stopped, state = False, self.state
        while (state.samples < self._end or state.unfinished is not None) and not stopped:
            count = self.plan.ranks_at(state.samples if state.unfinished is None else state.unfinished)
            self.parts.heartbeat.at(IDLE if self.ranks.rank >= count else "starting a phase")
            with ranks_of_phase(self.ranks, count, state, stop) as phase:
                if phase.team:
                    phase.stopped = self._train(phase.team, stop)
            stopped = phase.stopped
            self._use(self.ranks)
            self._replan()

    def _train(self, team: Ranks, stop: Stop) -> bool:
        """Train until the number of ranks changes or the attempt ends; return whether a stop was requested."""
        self._use(team)
        state, stopped, window = self.state, False, MetricWindow()
        ghost_batches = self._ghost_batches()
        if state.unfinished is not None:
            window = self._after_update(state.unfinished, window)
        while not stopped and state.samples < self._end and self.plan.ranks_at(state.samples) == team.size:
            if state.growth.round_at == state.samples:
                stopped = self._train_branches(stop)
                continue  # the batch may have grown onto more ranks
            before, index = state.samples, self.plan.schedule.index_at(state.samples)
            phase, micro_batch = self.plan.schedule.at(before), self.plan.layouts[index].micro_batch
            result = self.update(ghost_batches, phase, micro_batch, stop=self._stop_requested(stop))
            window.add(result, phase.global_batch)
            stopped = result.stop_requested
            window = self._after_update(before, window, stopped=stopped)
        return stopped

    def _after_update(self, before: int, window: MetricWindow, *, stopped: bool = False) -> MetricWindow:
        """Do what is due after an update: records, an evaluation, a decision, a re-estimation and a checkpoint.

        If ranks of an elastic run are lost meanwhile, the next attempt does all of it again from the same state.

        Args:
            before: sample counter before the update.
            window: of updates whose record has not been sent; without the update, if an earlier attempt did it.
            stopped: whether a stop was requested.

        Returns:
            the window of the next update.
        """
        state, index = self.state, self.plan.schedule.index_at(before)
        phase, micro_batch = self.plan.schedule.at(before), self.plan.layouts[index].micro_batch
        at_boundary = state.samples == phase.end_samples
        is_due = self._is_due(before, self.job.evaluation.every_epochs) or state.growth.is_due(before, state.samples)
        if self.ranks.elastic and (at_boundary or is_due):
            state.unfinished = before
            self._before_work = host_copy(state.capture())
        # A phase of an adaptive schedule ends after the evaluation that its trigger reads, also in a replay.
        may_grow = self.job.is_adaptive and state.samples < self.plan.schedule.end_samples
        if at_boundary and not may_grow and not self.is_branch:
            reestimate(self.parts, state.samples, micro_batch, self.team)
        pauses = may_grow and self._plan_round(before)
        if stopped or at_boundary or pauses or self._is_due(before, Fraction(1, self.job.logging.logs_per_epoch)):
            window = self._log(window, index, phase)
        evaluation = self._evaluate_if_due(before)
        if may_grow and self._decide_if_due(before, evaluation, at_boundary=at_boundary):
            # In a replay, a change of the gain ends a phase of the plan, too.
            window, at_boundary = self._log(window, index, phase), state.samples in self.plan.milestones
        if may_grow and at_boundary and reestimate(self.parts, state.samples, micro_batch, self.team):
            state.forget_evaluation()
        state.unfinished = self._before_work = None
        self._save_if_due(before, must_save=stopped or at_boundary or pauses)
        return window

    def _plan_round(self, before: int) -> bool:
        """Return whether the run pauses before its next update to train branches."""
        growth, samples = self.state.growth, self.state.samples
        pauses = growth.plan_round(before, self.plan, samples)
        rule = growth.branch_rule
        if rule and rule.state.over_budget_at == samples:
            batch = self.plan.schedule.at(samples).global_batch
            self.observers.notify("on_branches", BranchesCompared(samples, batch, 0, 0.0, rule.over_budget(batch)))
        return pauses

    def _train_branches(self, stop: Stop) -> bool:
        """Train the branches that are due, and follow what they show; return whether a stop was requested."""
        state, growth = self.state, self.state.growth
        evidence, rule = NO_EVIDENCE, growth.branch_rule
        assert rule is not None
        if not growth.is_decided(state.samples):
            if not rule.fits(state.samples, self.plan.schedule.at(state.samples).global_batch):
                rule.state.round_at = None  # the job of this fork does not allow the round
                return False
            assert self.rounds is not None
            self.team.run_on_rank0(self.writer.wait)  # the branches start from the checkpoint
            found = self.rounds.run(self.team, self.plan, state.samples, rule, stop)
            if found is None:
                return True
            evidence = found
        before = self.plan.schedule.index_at(state.samples - 1)
        growth.end_round(self.plan, state.samples)
        micro_batch = self.plan.layouts[before].micro_batch
        if self._look({}, evidence) is not None and reestimate(self.parts, state.samples, micro_batch, self.team):
            state.forget_evaluation()
        self._save()  # also without a decision, so that the branches are compared once
        return False

    def update(
        self, ghost_batches: GhostBatchStream, phase: Phase, micro_batch: int, *, stop: bool = False
    ) -> UpdateResult:
        """Do the next update, and advance the sample counter.

        Args:
            ghost_batches: those of this rank, from `TrainingParts.ghost_batches`.
            phase: gives batch, learning rate and momentum.
            micro_batch: its largest number of samples.
            stop: whether this rank requests a stop.
        """
        state, parts, ghost_batch, batch = self.state, self.parts, self.plan.ghost_batch, phase.global_batch
        passes = micro_batches_of_rank(state.samples, batch, ghost_batch, micro_batch, self.team.rank, self.team.size)

        def read(ghost_batches: GhostBatchStream) -> Iterator[MicroBatch]:
            return read_micro_batches(ghost_batches, passes, parts.keyed_by, parts.heartbeat.at)

        again = lambda: read(self._ghost_batches(keep_prefetched=True))  # noqa: E731
        try:
            result = parts.engine.update(
                *(read(ghost_batches), len(passes), phase, batch // ghost_batch),
                stop=stop,
                again=again,
                check=self.replay_check.of_next_update(self.plan, micro_batch),
            )
        except (NonFinite, OverflowError) as fault:  # sums are bit-identical on all ranks, so all of them raise
            train, check = parts.source.train, parts.check_targets
            raise self._failure(describe(fault, self.plan, parts.stream, state.samples, train, check)) from None
        self.elastic.last_update = UpdateDone(state.samples, batch, result.digest, result.replaced)
        self.elastic.num_updates += 1
        state.add(result, batch)
        self.observers.notify("on_update", self.elastic.last_update)
        return result

    def _ghost_batches(self, *, keep_prefetched: bool = False) -> GhostBatchStream:
        """Return this rank's ghost batches from the next update on, from the prefetched ones unless those are kept."""
        num_ghost_batches = lambda index: ghost_batches_per_micro_batch(self.plan, index, self.team.size)  # noqa: E731
        return self.parts.ghost_batches(
            self.state.samples, self.team, num_ghost_batches, keep_prefetched=keep_prefetched
        )

    def _restore(self, checkpoint: Checkpoint | None, replay: Path | None) -> list[str]:
        """Load the checkpoint and the recorded decisions; return notes for the user."""
        notes = self.state.begin(checkpoint, self.ranks)
        self._replan()
        notes += self.state.growth.open(self.folder, self.ranks, self.plan, self.state.samples, replay)
        self._replan()
        if self.state.growth.measures_noise:
            self.parts.measure_noise()
        return notes

    def _use(self, team: Ranks) -> None:
        """Share the following updates and evaluations among these ranks, which include this one."""
        self.team = team
        self.replay_check = ReplayCheck(self.parts, team, self.state, self.folder)
        self.parts.engine.use(team)

    @property
    def _end(self) -> int:
        """Where this attempt ends; a new batch moves the end of an adaptive schedule by part of a batch."""
        return self.plan.schedule.end_samples if self.end_samples is None else self.end_samples

    def _stop_requested(self, stop: Stop) -> bool:
        """Return whether this rank requests a stop: the ranks vote during an update, and the run stops after it."""
        is_last = self.max_updates is not None and self.elastic.num_updates >= self.max_updates - 1
        return is_last or stop.stop_requested or self.team.stop_requested_elsewhere()

    def _is_due(self, before: int, every_epochs: float | Fraction) -> bool:
        """Return whether a multiple of a number of epochs lies between a sample counter and the current one."""
        return period_ends(before, self.state.samples, every_epochs, self.plan.num_samples)

    def _failure(self, message: str) -> CollectiveError:
        """Return the error that all ranks raise together; rank 0 reports it."""
        return CollectiveError(RunError(message) if self.ranks.rank == 0 else None, ExitCode.FAILURE)

    def _log(self, window: MetricWindow, index: int, phase: Phase) -> MetricWindow:
        """Send the record of a window of updates to the observers; return the next window."""
        if window.updates:
            trust_ratio, seconds = median_trust_ratio(self.parts.optimizer), self.parts.engine.stopwatch.read()
            record = window.record(self.plan, index, phase, self.state, trust_ratio, seconds)
            self.observers.notify("on_record", record)
        return MetricWindow()

    def _evaluate_if_due(self, before: int) -> Evaluation | None:
        """Evaluate the set that decisions may be based on; at the end of the run, with a validation set, both sets."""
        is_last = self.state.samples >= self.plan.schedule.end_samples
        if self.is_branch or (not is_last and not self._is_due(before, self.job.evaluation.every_epochs)):
            return None
        if self.parts.source.validation is None:
            return self._evaluate("test", is_last=is_last)
        evaluation = self._evaluate("validation")
        if self.state.keep_best(evaluation, self.team):
            self._save(as_best=True)  # here, because a decision may change the weights before the next checkpoint
        if is_last:
            self._evaluate("test", is_last=True)
        return evaluation

    def _evaluate(self, dataset: EvaluatedSet, *, is_last: bool = False) -> Evaluation:
        updates = self.plan.schedule.updates_at(self.state.samples)
        begin = time.perf_counter()
        found = evaluate(self.parts, self.state, self.team, dataset, with_outcomes=is_last)
        evaluation = replace(found, updates=updates, seconds=time.perf_counter() - begin)
        self.state.evaluation = evaluation
        self.observers.notify("on_evaluation", evaluation)
        if not evaluation.is_finite and self.job.update.on_nonfinite == "stop":
            source, check = self.parts.source, self.parts.check_targets
            evaluated = source.validation if dataset == "validation" and source.validation is not None else source.test
            raise self._failure(describe_evaluation(evaluation, self.job.update.precision, evaluated, check))
        return evaluation

    def _decide_if_due(self, before: int, evaluation: Evaluation | None, *, at_boundary: bool) -> Decision | None:
        """Run the trigger if it is due; return the decision that takes effect here, new or on record."""
        state = self.state
        if not (evaluation or at_boundary or state.growth.is_due(before, state.samples)):
            return None
        return self._look(evaluation.named() if evaluation else {})

    def _look(self, metrics: Mapping[str, float], branches: Evidence = NO_EVIDENCE) -> Decision | None:
        """Run the trigger; return the decision that takes effect here."""
        growth, samples = self.state.growth, self.state.samples
        decision = growth.look(self.team, self.plan, samples, metrics, self.folder, branches)
        if decision is not None:
            if decision.restore_samples is not None:
                self.state.forget_evaluation()
            self._replan()
            self.observers.notify("on_decision", Decided(decision, self.plan))
        return decision

    def _replan(self) -> None:
        """Compile the plan with all known decisions, if they have changed."""
        decisions = self.state.growth.decisions
        if decisions == self.plan.decisions:
            return
        self.plan = compile_plan(self.plan.job, self.plan.num_ranks, self.plan.num_samples, None, decisions)
        self.writer.milestones = self.plan.milestones
        if self.ranks.rank == 0:
            write_plan(self.folder, plan_to_write(self.plan, self.shown, self.ranks))

    def _save_if_due(self, before: int, *, must_save: bool) -> None:
        if must_save or self._is_due(before, self.job.checkpoint.every_epochs):
            self._save()
        elif self.ranks.rank == 0:
            self.writer.check()

    def _save(self, *, as_best: bool = False) -> None:
        """Write a checkpoint on rank 0, after all ranks have compared their weights."""
        self.parts.heartbeat.at("comparing the weights of all ranks")
        check_agreement(self.parts.model, self.team, self.state.samples)
        if self.ranks.rank == 0:
            self.parts.heartbeat.at("waiting for the checkpoint before")
            self.writer.save(self.state.capture(), as_best=as_best)

    def _keep_for_next_attempt(self) -> None:
        """After ranks were lost, keep this rank's state after the last complete update."""
        self.parts.engine.changing.restore()  # undo the changes of an incomplete update
        ended = ended_at(self, self.plan.schedule.end_samples)
        self.observers.notify(
            "on_end", replace(ended, done=False, lost_ranks=True)
        )  # work after its update may be left
        # References would keep it on the device.
        self.elastic.checkpoint = self._before_work or host_copy(self.state.capture())
