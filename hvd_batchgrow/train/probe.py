"""Measure the time of an update on the present ranks, with the engine, model and data of training."""

from __future__ import annotations

import itertools
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.order.stream import micro_batches_of_rank
from hvd_batchgrow.data.pipeline.reader import choose_pipeline
from hvd_batchgrow.data.source_checks import known_num_samples
from hvd_batchgrow.schedule.cost.probe_file import (
    Probe,
    RankProbe,
    TimedSum,
    TimedUpdate,
    check_out,
    check_probe,
    load_probe,
    merge_probes,
    save_probe,
    subject_of,
)
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.plan_for_ranks import measurable_plan
from hvd_batchgrow.train.run.setup import load_together, prepare_rank
from hvd_batchgrow.train.update.gradients import summed_type, wire_type_of
from hvd_batchgrow.train.update.micro_batches import read_micro_batches
from hvd_batchgrow.train.update.stopwatch import stopwatch_of

ReportLine = Callable[[str], None]
"""Called with a line of progress, on every rank."""

BUDGET_S = 25.0
_ROUNDS = (3, 40)
_SUM_REPEATS = 30


def probe_into(
    path: Path,
    load: Callable[[], Job],
    ranks: Ranks,
    report: ReportProgress,
    report_line: ReportLine,
    budget_s: float = BUDGET_S,
) -> Probe | None:
    """Probe a job and add the results to a file, which keeps those of other numbers of ranks.

    Args:
        path: PROBE.json, which may exist; only rank 0 reads it.

    The other arguments are those of `probe_job`.

    Returns:
        The new contents of the file on rank 0; None on the other ranks.

    Raises:
        CollectiveError: as `probe_job`; or the file is damaged, belongs to another job, or cannot be written.
    """

    def find() -> Probe | None:
        if ranks.rank:
            return None
        check_out(path)
        if not path.exists():
            return None
        found = load_probe(path)
        check_probe(load(), found)
        return found

    old = ranks.run_on_all(find)
    new = probe_job(load, ranks, report, report_line, budget_s)

    def save() -> Probe | None:
        if new is None:
            return None
        merged = merge_probes(old, new)
        save_probe(path, merged)
        return merged

    return ranks.run_on_all(save)


def probe_job(
    load: Callable[[], Job], ranks: Ranks, report: ReportProgress, report_line: ReportLine, budget_s: float = BUDGET_S
) -> Probe | None:
    """Time all-reduces and whole updates of several shapes. Write nothing, and discard the trained weights.

    Args:
        load: returns the job; every rank calls it.
        ranks: all of them call this.
        report: called with the progress of downloads.
        report_line: called with lines of progress.
        budget_s: approximate duration of the measurement; each shape is measured at least three times.

    Returns:
        The measurements on rank 0; None on the other ranks.

    Raises:
        CollectiveError: the job cannot be planned, or its data or packages are unusable.
    """
    job, phase = ranks.run_on_all(lambda: _prepare(load()))
    source = load_together(job, ranks, report)
    placement = prepare_rank(job, ranks)
    for note in placement.notes:
        report_line(note)
    with closing(source):
        bench = _Bench(TrainingParts(job, source, ranks, placement.device, pretrained=False), phase, ranks)
        sums = _measure_sums(bench, report_line) if ranks.size > 1 else ()
        updates = _measure_updates(bench, report_line, budget_s)
    return _probe(bench, sums, updates) if ranks.rank == 0 else None


def _prepare(job: Job) -> tuple[Job, Phase]:
    """Plan the job for one rank, which can form every batch; return its first phase."""
    job = job.model_copy(update={"layout": job.layout.grown_by("accumulation")})
    plan = measurable_plan(job, 1, known_num_samples(job.data))
    return job, plan.schedule.phases[0]


def _probe(bench: _Bench, sums: Sequence[TimedSum], updates: Sequence[TimedUpdate]) -> Probe:
    job, ranks, device, train = bench.job, bench.ranks, bench.device, bench.parts.source.train
    part = RankProbe(
        ranks=ranks.size,
        ranks_per_host=ranks.local_size,
        threads_per_rank=torch.get_num_threads(),
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        backend=ranks.backend,
        measured_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        micro_batch_limit=job.micro_batch_limit,
        sums=tuple(sums),
        updates=tuple(updates),
    )
    return Probe(
        job=job.name,
        subject=subject_of(job) | {"data.pipeline": choose_pipeline(job.data, train)},
        image_shape=train.shape,
        gradient_bytes=bench.gradient_bytes,
        measured=(part,),
    )


# --- updates ---------------------------------------------------------------------------------


class _Bench:
    """Does updates of any shape; the stream of samples never ends."""

    def __init__(self, parts: TrainingParts, phase: Phase, ranks: Ranks) -> None:
        self.parts, self.job, self.device, self.ranks = parts, parts.job, parts.device, ranks
        # Train with a tiny learning rate, so that the weights do not diverge with a batch that no schedule contains.
        self._phase = replace(phase, lr=1e-3 * phase.lr)
        parameters = [p for p in parts.model.parameters() if p.requires_grad]
        wire_type, exact = wire_type_of(self.job.update), self.job.layout.exact
        self.gradient_bytes = sum(p.numel() * summed_type(p.dtype, wire_type, exact=exact).itemsize for p in parameters)
        self._samples, self._ghost_batches_per_pass = 0, 1
        most = max(1, self.job.micro_batch_limit // self.job.model.ghost_batch)
        self._ghost_batches = parts.ghost_batches(0, ranks, lambda _: min(self._ghost_batches_per_pass, most))
        self.stopwatch = parts.engine.stopwatch

    def update(self, micro_batch: int, accumulation: int) -> None:
        """Do one update."""
        ranks, parts, ghost_batch = self.ranks, self.parts, self.job.model.ghost_batch
        batch, self._ghost_batches_per_pass = ranks.size * accumulation * micro_batch, micro_batch // ghost_batch
        passes = micro_batches_of_rank(self._samples, batch, ghost_batch, micro_batch, ranks.rank, ranks.size)
        micro_batches = read_micro_batches(self._ghost_batches, passes, parts.keyed_by, parts.heartbeat.at)
        phase = replace(self._phase, global_batch=batch)
        parts.engine.update(micro_batches, len(passes), phase, batch // ghost_batch)
        self._samples += batch

    def mean(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return the means over the ranks, on all ranks."""
        return tuple(
            (self.ranks.all_reduce(torch.tensor(values, dtype=torch.float64), "probe") / self.ranks.size).tolist()
        )


def _measure_updates(bench: _Bench, report_line: ReportLine, budget_s: float) -> list[TimedUpdate]:
    """Return medians over rounds. Each round times every shape, so that a disturbance affects all shapes alike."""
    shapes = list(update_shapes(bench.job, on_cpu=bench.device.type == "cpu"))
    report_line(f"updates of {len(shapes)} shapes, once to warm up")
    round_s = _warm_up(bench, shapes)
    rounds = min(_ROUNDS[1], max(_ROUNDS[0], round(budget_s / round_s)))
    blocks = []
    for k in range(rounds):
        report_line(f"updates, round {k + 1} of {rounds}, {round_s:.1f} s each")
        blocks.append([_time_block(bench, *shape) for shape in shapes])
    return [
        TimedUpdate(
            micro_batch=micro_batch,
            accumulation=accumulation,
            seconds=statistics.median(seconds for seconds, _ in found),
            data_wait_s=statistics.median(data_wait_s for _, data_wait_s in found),
        )
        for (micro_batch, accumulation), found in zip(shapes, zip(*blocks, strict=True), strict=True)
    ]


def _warm_up(bench: _Bench, shapes: Sequence[tuple[int, int]]) -> float:
    """Return the seconds of a round. In the first round libraries choose their kernels; the second one is timed."""
    for shape in shapes:
        bench.update(*shape)
    begin = time.perf_counter()
    for shape in shapes:
        _time_block(bench, *shape)
    return bench.mean([time.perf_counter() - begin])[0]


def _time_block(bench: _Bench, micro_batch: int, accumulation: int) -> tuple[float, ...]:
    """Return the seconds and the data wait of an update: means over at least four micro-batches and over the ranks."""
    repeats = max(1, 4 // accumulation)
    bench.stopwatch.read()  # the device is now idle
    for _ in range(repeats):
        bench.update(micro_batch, accumulation)
    seconds = bench.stopwatch.read()
    return bench.mean([sum(seconds.values()) / repeats, seconds["data"] / repeats])


def update_shapes(job: Job, *, on_cpu: bool) -> Iterator[tuple[int, int]]:
    """Yield the micro-batch and the accumulation of each update to measure.

    The micro-batches are the largest that the job allows, half and a quarter of it, and one ghost batch, each with
    an accumulation of 1, 2, 4 and 8. If the job allows only one ghost batch, two and four are measured too, which
    separates the cost per micro-batch from the cost per sample. A GPU skips these: they may exceed its memory.
    """
    ghost_batch = job.model.ghost_batch
    most = job.micro_batch_limit // ghost_batch
    for num_ghost_batches in sorted({1, max(1, most // 4), max(1, most // 2), most}):
        yield from ((num_ghost_batches * ghost_batch, passes) for passes in (1, 2, 4, 8))
    if most == 1 and on_cpu and not job.layout.exact:
        yield from itertools.product((2 * ghost_batch, 4 * ghost_batch), (1, 2))


# --- sums ------------------------------------------------------------------------------------


def _measure_sums(bench: _Bench, report_line: ReportLine) -> list[TimedSum]:
    """Time all-reduces of 1/16, 1/4, 1 and 4 times the size of the gradient."""
    num_values = max(16, bench.gradient_bytes // 4)
    report_line(f"sums over {bench.ranks.size} ranks")
    return [_time_sum(bench, n) for n in (num_values // 16, num_values // 4, num_values, 4 * num_values)]


def _time_sum(bench: _Bench, num_values: int) -> TimedSum:
    values, stopwatch = torch.zeros(num_values, device=bench.device), stopwatch_of(bench.device)
    seconds = []
    for _ in range(_SUM_REPEATS):
        stopwatch.begin("all-reduce")
        bench.ranks.all_reduce(values, f"probe.{num_values}")
        stopwatch.enter(None)
        seconds.append(stopwatch.read()["all-reduce"])  # waits for the device before the next sum
    # Skip the first ones, in which the ranks negotiate names and buffers.
    (median_s,) = bench.mean([statistics.median(seconds[_SUM_REPEATS // 5 :])])
    return TimedSum(num_bytes=4 * num_values, seconds=median_s)
