"""The training loop: updates, records, evaluations, decisions and checkpoints, each due at a sample count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from hvd_batchgrow.comm.broadcast_object import broadcast_tree
from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import DatasetPair
from hvd_batchgrow.data.order.stream import Stream, groups_of_rank, passes_of_rank
from hvd_batchgrow.data.pipeline.reader import GhostBatch, Reader, choose_pipeline
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.nn.state.extra_state import is_extra_state
from hvd_batchgrow.nn.state.forward_state import restored_buffers
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.optim.lars import median_trust_ratio
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.layout import Layout
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.rounding import period_ends
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.train.checkpoints.writer import CheckpointWriter
from hvd_batchgrow.train.evaluate import evaluate
from hvd_batchgrow.train.events import Decided, Evaluation, Observer, ObserverList, RunEnded, RunStarted, UpdateDone
from hvd_batchgrow.train.growth_controller import GrowthController
from hvd_batchgrow.train.liveness.stop import Stop
from hvd_batchgrow.train.liveness.watchdog import IDLE, Heartbeat, Watchdog
from hvd_batchgrow.train.metric_window import MetricWindow
from hvd_batchgrow.train.precise_bn import reestimate_together
from hvd_batchgrow.train.rank_subsets import train_on_first
from hvd_batchgrow.train.run.run_folder import write_plan
from hvd_batchgrow.train.run.setup import build_network, choose_device, on_bad_sample
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.forward import MicroBatch, as_parameters, autocast
from hvd_batchgrow.train.update.loss_scale import LossScale
from hvd_batchgrow.train.update.micro_batches import gather_replaced, inputs_of, join_groups
from hvd_batchgrow.train.update.non_finite import NonFinite, describe, describe_evaluation
from hvd_batchgrow.train.update.weight_average import WeightAverage
from hvd_batchgrow.train.weights_agree import check_agreement


class Trainer:
    """Trains a run from its first update or from a checkpoint until its end or a stop.

    Args:
        job: the job to train.
        plan: compiled from the job for these ranks.
        source: the data.
        ranks: the processes that train together.
        folder: the run folder, into which rank 0 writes.
        observers: receive the events of the run; empty on all ranks but rank 0.
    """

    def __init__(
        self, job: Job, plan: Plan, source: DatasetPair, ranks: Ranks, folder: Path, observers: Sequence[Observer]
    ) -> None:
        self.job, self.plan, self.source, self.ranks = job, plan, source, ranks
        self.folder = folder
        self.observer_list = ObserverList(observers, folder)
        self.device = choose_device(ranks)
        torch.manual_seed(job.seed)
        self.reader = Reader(job.data, source, self.device, torch.get_num_threads(), on_bad_sample(job, ranks))
        self.model, self.hazards, self.forward_state = ranks.run_on_all(lambda: build_network(job, source, self.device))
        self.optimizer = build_optimizer(self.model, job.optim)
        rescale = getattr(job.optim, "rescale_momentum", False)
        self.engine = UpdateEngine(
            self.model,
            self.optimizer,
            ranks,
            rule=job.update,
            rescale_momentum=rescale,
            exact=job.layout.exact,
            forward_state=self.forward_state,
        )
        memory = job.update.ema_samples
        self.average = WeightAverage(self.model, memory) if memory else None
        self.growth = GrowthController(job, plan.num_samples, self.model, self.average)
        self.pulse = Heartbeat()
        self.engine.at = self.pulse.at
        self.stream = Stream(len(source.train), job.seed)
        self.samples = 0
        self.num_updates = 0
        self.num_skipped = 0
        self.team = ranks
        self._is_whole = True
        self._last_update: UpdateDone | None = None
        self.evaluation: Evaluation | None = None
        boundaries = {phase.end_samples for phase in plan.schedule.phases}
        self.writer = CheckpointWriter(folder / "checkpoints", job.checkpoint.keep, boundaries)
        self._elapsed_before_s = 0.0
        self._begin = time.perf_counter()

    def run(
        self,
        stop: Stop,
        checkpoint: Checkpoint | None = None,
        notes: Sequence[str] = (),
        end_samples: int | None = None,
        last_update: UpdateDone | None = None,
        replay: Path | None = None,
    ) -> RunEnded:
        """Train to the end, or until a stop is requested of any rank.

        Args:
            stop: reports whether a stop is requested of this rank.
            checkpoint: the checkpoint to resume; None: start from the first update.
            notes: notices for the observers.
            end_samples: end of a phase at which this attempt ends; None: the end of the run.
            last_update: the update before this attempt, if it may not be on record.
            replay: decisions to follow, without making others; None: follow those of the run and its trigger.

        Raises:
            CollectiveError: the decisions cannot be replayed.
            RunError: a checkpoint cannot be written.
            RanksLost: in an elastic job, ranks were lost; see `break_off`.
        """
        self._last_update = last_update
        stopped = False
        with Watchdog(self.ranks, self.pulse, self.job.logging.stall_timeout_s), self.writer:
            self._restore(checkpoint)
            notes = [*notes, *self.growth.open(self.folder, self.ranks, self.plan, self.samples, replay)]
            self._replan()
            if self.growth.measures_noise:
                section = self.job.gradient_noise
                self.engine.measure_noise(
                    preconditioned=section.preconditioned, per_layer_group=section.per_layer_group
                )
            self._notify_start(notes)
            while self.samples < self._end(end_samples) and not stopped:
                count = self.plan.ranks_at(self.samples)[0]
                self.pulse.at(IDLE if self.ranks.rank >= count else "starting a phase")
                stopped = train_on_first(self, count, partial(self._train, end_samples), stop)
        ended = self._ended(self._end(end_samples))
        self.observer_list.notify("on_end", ended)
        return ended

    def use(self, team: Ranks) -> None:
        """Share the following updates and evaluations among these ranks, which include this one."""
        self.team = team
        self.engine.use(team)

    def _end(self, end_samples: int | None) -> int:
        """Return where this attempt ends; a new batch moves the end of an adaptive schedule by part of a batch."""
        return self.plan.schedule.end_samples if end_samples is None else end_samples

    def _until(self, end_samples: int | None) -> int:
        """Return the sample counter up to which the current ranks train, according to the plan so far."""
        count, until = self.plan.ranks_at(self.samples)
        return min(until, self._end(end_samples)) if count == self.team.size else self.samples

    def _train(self, end_samples: int | None, stop_requested: Callable[[], bool]) -> bool:
        """Train until the number of ranks changes or the run ends; return whether a stop was requested."""
        window, stopped = MetricWindow(), False
        batches, until = self.open_batches(), self._until(end_samples)
        while self.samples < until and not stopped:
            schedule = self.plan.schedule
            index = schedule.index_at(self.samples)
            before, phase = self.samples, schedule.at(self.samples)
            result = self.update(batches, phase, self.plan.layouts[index], stop=stop_requested())
            window.add(result, phase.global_batch)
            self.growth.add(result, phase.global_batch)
            stopped = result.stop_requested
            at_boundary = self.samples == phase.end_samples
            # A phase of an adaptive schedule ends after the evaluation that its trigger reads, also in a replay.
            may_grow = self.job.is_adaptive and self.samples < schedule.end_samples
            if at_boundary and not may_grow:
                self._reestimate(index)
            if stopped or at_boundary or self._is_due(before, Fraction(1, self.job.logging.logs_per_epoch)):
                self._record(window, index, phase)
                window = MetricWindow()
            evaluation = self._evaluate_if_due(before)
            if may_grow:
                if self._grow(before, evaluation, at_boundary=at_boundary):
                    self._record(window, index, phase)
                    at_boundary = not self.job.trigger.scales_progress
                    window, until = MetricWindow(), self._until(end_samples)
                if at_boundary:
                    self._reestimate(index)
            self._save_if_due(before, must_save=stopped or at_boundary)
        return stopped

    def _grow(self, before: int, evaluation: Evaluation | None, *, at_boundary: bool) -> Decision | None:
        """Run the trigger if it is due; return the decision that takes effect here, new or on record."""
        every = self.growth.every_epochs
        is_due = every and self._is_due(before, every)
        if not (is_due or evaluation or at_boundary or self.growth.window_ends(before, self.samples)):
            return None
        metrics = {"loss": evaluation.loss, "top1": evaluation.top1} if evaluation else {}
        decision = self.growth.look(self.team, self.plan, self.samples, metrics, self.folder)
        if decision is not None:
            self._replan()
            self.observer_list.notify("on_decision", Decided(decision, self.plan))
        return decision

    def _replan(self) -> None:
        """Compile the plan with all known decisions, if they have changed."""
        if self.growth.decisions == self.plan.decisions:
            return
        self.plan = compile_plan(self.plan.job, self.plan.num_ranks, self.plan.num_samples, None, self.growth.decisions)
        if not self.job.trigger.scales_progress:
            for decision in self.growth.decisions:
                self.writer.keep_for_good(decision.samples)
        if self.ranks.rank == 0:
            write_plan(self.folder, self.plan)

    def open_batches(self) -> Iterator[GhostBatch]:
        """Return this rank's ghost batches from the sample counter on."""
        group, ranks = self.plan.ghost_batch, self.team
        first = groups_of_rank(self.samples // group, ranks.size, ranks.rank, ranks.size)[0]
        return self.reader.training(self.stream, group, first, ranks.size)

    def update(self, batches: Iterator[GhostBatch], phase: Phase, layout: Layout, *, stop: bool) -> UpdateResult:
        """Do the next update, and advance the sample counter.

        Args:
            batches: from `open_batches`.
            phase: gives batch, learning rate and momentum.
            layout: how the batch is split into ranks and micro-batches.
            stop: whether this rank requests a stop.
        """
        group, batch, ranks = self.plan.ghost_batch, phase.global_batch, self.team
        passes = passes_of_rank(self.samples, batch, group, layout.micro_batch, ranks.rank, ranks.size)
        taken: list[GhostBatch] = []
        micro_batches = (self._take(batches, positions, taken) for positions in passes)
        try:
            result = self.engine.update(micro_batches, len(passes), phase, batch // group, stop=stop)
        except (NonFinite, OverflowError) as fault:  # sums are bit-identical on all ranks, so all of them raise
            error = RunError(describe(fault, self.plan, self.stream, self.samples))
            raise CollectiveError(error if self.ranks.rank == 0 else None, ExitCode.FAILURE) from None
        self._is_whole = False
        self.num_skipped += result.skipped
        if self.average and not result.skipped:
            self.average.update(phase.global_batch)
        replaced = gather_replaced(taken, self.team) if result.num_replaced else ()
        self._last_update = UpdateDone(self.samples, phase.global_batch, result.digest, replaced)
        self.observer_list.notify("on_update", self._last_update)
        self.samples += phase.global_batch
        self.num_updates += 1
        self._is_whole = True
        return result

    def _take(self, batches: Iterator[GhostBatch], positions: tuple[int, ...], taken: list[GhostBatch]) -> MicroBatch:
        """Return the next ghost batches as one micro-batch; append those with replaced samples to `taken`."""
        self.pulse.at("reading samples")
        groups = [next(batches) for _ in positions]
        self.pulse.at("computing gradients")
        taken += [group for group in groups if group.replaced.any()]
        keyed_by = (self.job.seed, self.plan.num_samples) if self.engine.dropouts else None
        return join_groups(groups, positions, keyed_by)

    def _reestimate(self, index: int) -> None:
        """At the end of a phase, re-estimate the running statistics if the job requests it."""
        if self.job.model.precise_bn_samples:
            self.reestimate(self.job.model.precise_bn_samples, self.plan.layouts[index])

    def reestimate(self, num_samples: int, layout: Layout) -> None:
        """Re-estimate the running statistics with the current weights.

        Args:
            num_samples: number of most recent samples to use, rounded up to whole ghost batches.
            layout: how the ghost batches are combined into micro-batches.
        """
        group, ranks = self.plan.ghost_batch, self.team
        last = self.samples // group
        num_groups = min(last, -(-num_samples // group))
        mine = groups_of_rank(last - num_groups, num_groups, ranks.rank, ranks.size)
        batches = self.reader.training(self.stream, group, mine[0], ranks.size) if mine else iter(())
        passes = inputs_of(islice(batches, len(mine)), layout.micro_batch // group)
        in_evaluation = restored_buffers(self.model, self.forward_state.in_evaluation)
        with in_evaluation, autocast(self.device, self.job.update.precision):
            inputs = (as_parameters(batch, self.model) for batch in self._ticking(passes))
            reestimate_together(self.model, inputs, ranks, exact=self.job.layout.exact)

    def _ticking(self, passes: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for batch in passes:
            self.pulse.at("re-estimating")
            yield batch

    def _evaluate_if_due(self, before: int) -> Evaluation | None:
        is_last = self.samples >= self.plan.schedule.end_samples
        if not is_last and not self._is_due(before, self.job.evaluation.every_epochs):
            return None
        self.evaluation = self.evaluate()
        self.observer_list.notify("on_evaluation", self.evaluation)
        if not self.evaluation.is_finite and self.job.update.on_nonfinite == "stop":
            fault = RunError(describe_evaluation(self.evaluation, self.job.update.precision))
            raise CollectiveError(fault if self.ranks.rank == 0 else None, ExitCode.FAILURE)
        return self.evaluation

    def _save_if_due(self, before: int, *, must_save: bool) -> None:
        is_due = must_save or self._is_due(before, self.job.checkpoint.every_epochs)
        if is_due:
            self.pulse.at("comparing the weights of all ranks")
            check_agreement(self.model, self.team, self.samples)
        if self.ranks.rank == 0:
            self.writer.check()
            if is_due:
                self.pulse.at("waiting for the checkpoint before")
                self.writer.save(self.capture())

    def evaluate(self) -> Evaluation:
        """Return loss and accuracy over the whole test set, which the training ranks share."""
        loss, top1 = self._loss_and_top1()
        if self.average is None:
            return Evaluation(self.samples, self._epoch(), loss, top1)
        with self.average.in_place():
            return Evaluation(self.samples, self._epoch(), loss, top1, *self._loss_and_top1())

    def _loss_and_top1(self) -> tuple[float, float]:
        num_test, batch, precision = len(self.source.test), self.job.evaluation.batch_size, self.job.update.precision
        with restored_buffers(self.model, self.forward_state.in_evaluation):
            return evaluate(self.model, self.reader, num_test, batch, self.team, precision, self.pulse.at)

    def _is_due(self, before: int, every_epochs: float | Fraction) -> bool:
        """Return whether a multiple of a number of epochs lies between a sample counter and the current one."""
        return period_ends(before, self.samples, every_epochs, self.plan.num_samples)

    def _epoch(self) -> float:
        return self.samples / self.plan.num_samples

    def _elapsed_s(self) -> float:
        return self._elapsed_before_s + time.perf_counter() - self._begin

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            self.adopt(checkpoint)
            self._elapsed_before_s = checkpoint.elapsed_s
        state = self.model.state_dict()
        extra = {name: state.pop(name) for name in list(state) if is_extra_state(name)}
        if extra:
            self.model.load_state_dict(broadcast_tree(self.ranks, extra, "initial.extra_state"), strict=False)
        for name, tensor in state.items():
            self.ranks.broadcast_values(tensor, f"initial.{name}")
        self._begin = time.perf_counter()

    def adopt(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint: weights, optimizer, sample counter and the rest of the state."""
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.samples = checkpoint.samples
        self.num_skipped = checkpoint.num_skipped
        if self.average:
            self.average.load_state_dict(checkpoint.average)
        if self.engine.loss_scale:
            self.engine.loss_scale = LossScale(**checkpoint.loss_scale)
        if (last := checkpoint.evaluation) and last["samples"] == self.samples:
            self.evaluation = Evaluation(self.samples, self._epoch(), last["loss"], last["top1"])
        self.growth.load(checkpoint.growth)
        self._replan()

    def capture(self) -> Checkpoint:
        """Return the current state as a checkpoint."""
        last = self.evaluation
        return Checkpoint(
            samples=self.samples,
            deciding=self.job.deciding(self.plan.num_samples),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            elapsed_s=self._elapsed_s(),
            evaluation={"samples": last.samples, "loss": last.loss, "top1": last.top1} if last else {},
            average=self.average.state_dict() if self.average else {},
            loss_scale=asdict(self.engine.loss_scale) if self.engine.loss_scale else {},
            num_skipped=self.num_skipped,
            growth=self.growth.state(),
        )

    def break_off(self, state: ElasticState) -> None:
        """After ranks were lost, keep this rank's state after the last whole update for the next attempt."""
        self.engine.changing.restore()  # undo the changes of an incomplete update
        self.observer_list.notify("on_end", self._ended(self.plan.schedule.end_samples))
        state.checkpoint = self.capture() if self._is_whole else None
        state.last_update = self._last_update

    def _record(self, window: MetricWindow, index: int, phase: Phase) -> None:
        if window.seconds:  # otherwise no update was done since the last record
            ratio = median_trust_ratio(self.optimizer)
            record = window.record(
                self.plan,
                index,
                phase,
                self.samples,
                trust_ratio=ratio,
                skipped=self.num_skipped,
                gradient_noise=self.growth.noise,
            )
            self.observer_list.notify("on_record", record)

    def _notify_start(self, notes: Sequence[str]) -> None:
        started = RunStarted(
            job=self.job,
            plan=self.plan,
            folder=self.folder,
            samples=self.samples,
            backend=self.ranks.backend,
            ranks=self.ranks.size,
            threads_per_rank=torch.get_num_threads(),
            pipeline=choose_pipeline(self.job.data.pipeline, self.source.train),
            device=str(self.device),
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            notes=tuple(notes),
            last_update=self._last_update,
        )
        self.observer_list.notify("on_start", started)

    def _ended(self, end_samples: int) -> RunEnded:
        schedule = self.plan.schedule
        return RunEnded(
            job_name=self.job.name,
            folder=self.folder,
            done=self.samples >= end_samples,
            samples=self.samples,
            updates=schedule.updates_at(self.samples),
            num_updates=schedule.num_updates,
            elapsed_s=self._elapsed_s(),
            evaluation=self.evaluation,
        )
