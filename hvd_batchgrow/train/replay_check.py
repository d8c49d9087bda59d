"""`checks.replay_every`: another rank repeats a rank's share of an update, and both must get the same gradient."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.data.order.stream import ghost_batches_left, micro_batches_of_rank
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.train.liveness.watchdog import WAITING
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.replay_failure import write_failure
from hvd_batchgrow.train.replay_verdict import Finding, Occasion, RankLocation, describe
from hvd_batchgrow.train.train_state import TrainState
from hvd_batchgrow.train.update.local_sums import LocalSums
from hvd_batchgrow.train.update.micro_batches import read_micro_batches
from hvd_batchgrow.train.update.recompute import recompute
from hvd_batchgrow.train.update.rounding_noise import MARGIN, NUM_REPEATS, Noise, noise_size
from hvd_batchgrow.train.weights_agree import check_agreement

_REPEATS_BEFORE_ALARM = 16
"""Repetitions with noise before a difference counts as a fault. If rounding has crossed the edge of a ReLU, each
repetition crosses it with a probability of about 1/2."""


@dataclass(frozen=True)
class _Update:
    """The update to check."""

    samples: int
    """Sample counter before it."""
    global_batch: int
    micro_batch: int
    """Largest number of samples of a micro-batch."""
    index: int
    """Its number, from 0."""


class ReplayCheck:
    """Repeats updates: rank r computes the share of rank r + 1 again, and the last rank that of rank 0.

    It reads the samples itself, so that a fault in reading is found too. A single rank repeats its own share.

    Args:
        parts: of this rank.
        ranks: that train together; if they change, a new check is needed.
        state: of the run; counts the passed checks.
        folder: the run folder, for the message.
    """

    def __init__(self, parts: TrainingParts, ranks: Ranks, state: TrainState, folder: Path) -> None:
        self._parts, self._ranks, self._state, self._folder = parts, ranks, state, folder
        self._limits: Tensor | None = None
        """The smallest measured limits; None: not measured yet."""
        self._num_differing = 0
        """Number of checks whose results were not bit-identical, outside exact mode."""

    def of_next_update(self, plan: Plan, micro_batch: int) -> Callable[[LocalSums, float], None] | None:
        """Return the check of the next update, for `UpdateEngine.update`; None: it is not due.

        Args:
            plan: of the run.
            micro_batch: largest number of samples of a micro-batch.
        """
        every, samples = self._parts.job.checks.replay_every, self._state.samples
        index = plan.schedule.updates_at(samples)
        if not every or (index + 1) % every:
            return None
        return partial(self._check, _Update(samples, plan.schedule.at(samples).global_batch, micro_batch, index))

    def _check(self, update: _Update, own: LocalSums, factor: float) -> None:
        """Compare the results of all ranks with their repetitions. All ranks call it together.

        Args:
            update: the update in progress.
            own: this rank's result.
            factor: on the loss of each sample.

        Raises:
            CollectiveError: the ranks hold different weights, or their results disagree.
        """
        begin = time.perf_counter()
        self._parts.heartbeat.at("comparing the weights of all ranks")
        self._parts.engine.changing.restore()  # each rank has the values after its own last micro-batch
        check_agreement(self._parts.model, self._ranks, update.samples, "The next update was not applied")
        repeat = partial(self._repeat, update, factor)
        again = repeat(1)
        if not (is_identical := self._all_identical(own, again)):
            results = [self._of_all(own), self._of_all(again)]
            suspects, limits = self._judge(repeat, results)
            if suspects:
                results.append(self._of_all(repeat(2)))
                self._fail(update, [self._finding(share, results, limits) for share in suspects])
        seconds = time.perf_counter() - begin
        self._state.replays = self._state.replays.plus(seconds, update.samples, is_identical=is_identical)

    def _repeat(self, update: _Update, factor: float, ahead: int, noise: Noise | None = None) -> LocalSums:
        """Compute the share of the rank `ahead` places after this one."""
        parts, size, ghost_batch = self._parts, self._ranks.size, self._parts.job.model.ghost_batch
        rank, batch, micro_batch = (self._ranks.rank + ahead) % size, update.global_batch, update.micro_batch
        passes = micro_batches_of_rank(update.samples, batch, ghost_batch, micro_batch, rank, size)
        counts = update.samples // ghost_batch, batch // ghost_batch, micro_batch // ghost_batch, size
        ghost_batches = parts.ghost_batches(
            update.samples,
            self._ranks,
            lambda index: ghost_batches_left(index, *counts),
            rank=rank,
            keep_prefetched=True,
        )
        micro_batches = read_micro_batches(ghost_batches, passes, parts.keyed_by, parts.heartbeat.at)
        return recompute(parts.engine, micro_batches, factor, noise)

    def _all_identical(self, own: LocalSums, again: LocalSums) -> bool:
        """Return whether both results of each share are bit-identical, by 16 bytes per rank; equal on all ranks."""
        self._parts.heartbeat.at(WAITING)
        rank, size = self._ranks.rank, self._ranks.size
        table = torch.zeros(2, size, dtype=torch.int64)
        table[0, rank], table[1, (rank + 1) % size] = own.checksum(), again.checksum()
        first, second = self._ranks.all_reduce(table, "replay checksums")
        return torch.equal(first, second)

    def _of_all(self, result: LocalSums) -> list[LocalSums]:
        """Return the results of all ranks, indexed by the rank that computed them."""
        self._parts.heartbeat.at(WAITING)
        words = result.words()
        table = torch.zeros(self._ranks.size, len(words), dtype=torch.int64)
        table[self._ranks.rank] = words
        return [result.from_words(row) for row in self._ranks.all_reduce(table, "replay")]

    def _judge(
        self, repeat: Callable[[int, Noise], LocalSums], results: Sequence[Sequence[LocalSums]]
    ) -> tuple[list[int], Tensor | None]:
        """Return the ranks whose shares have results that differ by more than rounding, and the limits.

        The arguments and limits are those of `_measured_limits`. Limits None: results must be bit-identical.
        """
        if self._parts.engine.exact:
            return self._suspects(results, None), None
        self._num_differing += 1
        is_due = self._num_differing.bit_count() == 1  # a power of two
        if not is_due and not self._suspects(results, self._limits):
            return [], self._limits
        measured = self._measured_limits(repeat, results, range(NUM_REPEATS))
        if self._suspects(results, measured):  # rounding may have crossed an edge of a ReLU that the noise missed
            more = self._measured_limits(repeat, results, range(NUM_REPEATS, _REPEATS_BEFORE_ALARM))
            measured = torch.maximum(measured, more)
        # The smallest limits are kept, so that an update near an edge does not hide faults in later ones.
        self._limits = measured if self._limits is None else torch.minimum(self._limits, measured)
        return self._suspects(results, measured), measured

    def _suspects(self, results: Sequence[Sequence[LocalSums]], limits: Tensor | None) -> list[int]:
        """Return the ranks whose shares have two results that disagree; equal on all ranks."""
        first, second = results
        shares = range(self._ranks.size)
        return [share for share in shares if not first[share].agrees(second[share - 1], _of_share(limits, share))]

    def _measured_limits(
        self, repeat: Callable[[int, Noise], LocalSums], results: Sequence[Sequence[LocalSums]], seeds: range
    ) -> Tensor:
        """Return how much rounding may change each share: twice the largest change by noise, plus the noise itself.

        Both ranks of a share measure it with the same noise, and the smaller limit counts: a device that computes
        other numbers each time must not raise its limit.

        Args:
            repeat: computes with noise the share of the rank a number of places after this one.
            results: the first and the second results of all ranks, without noise.
            seeds: a seed of the noise for each repetition.

        Returns:
            the largest `LocalSums.distances` for the share of each rank, float64 (R, n); equal on all ranks.
        """
        engine, rank = self._parts.engine, self._ranks.rank
        rule = engine.rule.model_copy(update={"allreduce_dtype": "none"})  # compared before the all-reduce
        size = noise_size(rule, engine.model, engine.device)
        limits = []
        for ahead, of_all in enumerate(results):
            noisy = [repeat(ahead, Noise(size, seed)) for seed in seeds]
            distances = torch.stack([of_all[rank].distances(one) for one in noisy])
            # Noise may overflow float16.
            limits.append(MARGIN * distances.nan_to_num(torch.inf, torch.inf).amax(0) + size)
        table = torch.zeros(2, self._ranks.size, len(limits[0]), dtype=torch.float64)
        for ahead, limit in enumerate(limits):
            table[ahead, (rank + ahead) % self._ranks.size] = limit
        return self._ranks.all_reduce(table, "replay limits").amin(0)

    def _finding(self, share: int, results: Sequence[Sequence[LocalSums]], limits: Tensor | None) -> Finding:
        ranks = tuple((share - back) % self._ranks.size for back in range(3))
        first, second, third = (of_all[rank] for of_all, rank in zip(results, ranks, strict=True))
        distances = first.distances(second)
        limit = _of_share(limits, share)
        allowed = torch.zeros_like(distances) if limit is None else limit
        excess = distances[:-1] - allowed[:-1]
        worst = int(excess.nan_to_num(-torch.inf, torch.inf).argmax())  # NaN: both are infinite
        return Finding(
            share,
            (ranks[0], ranks[1], ranks[2]),
            (third.agrees(first, limit), third.agrees(second, limit)),
            gradient=float(distances[worst]),
            gradient_limit=float(allowed[worst]),
            loss=float(distances[-1]),
            loss_limit=float(allowed[-1]),
            same_samples=first.digest == second.digest,
        )

    def _fail(self, update: _Update, findings: Sequence[Finding]) -> None:
        """Raise the error on all ranks; rank 0 reports it."""
        device = self._parts.device
        name = f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
        mine = RankLocation(self._ranks.rank, socket.gethostname(), name)
        gathered = self._ranks.all_gather_bytes(dump_json(asdict(mine)).encode(), "replay locations")
        locations = [RankLocation(**json.loads(location)) for location in gathered]
        last = self._state.replays.samples if self._state.replays.passed else None
        occasion = Occasion(update.index, update.samples, update.global_batch, last, str(self._folder))
        text = describe(findings, locations, occasion)
        if self._ranks.rank == 0:
            try:
                write_failure(self._folder, text, update.samples, last)
            except RunError as unwritten:
                text = f"{text}\n  {unwritten}: a resume will not refuse those checkpoints"
        error = RunError(text)
        raise CollectiveError(error if self._ranks.rank == 0 else None, ExitCode.FAILURE)


def _of_share(limits: Tensor | None, share: int) -> Tensor | None:
    return None if limits is None else limits[share]
