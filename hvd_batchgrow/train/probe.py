"""Measure what an update costs with the ranks that are there, with the engine, model and data of training."""

from __future__ import annotations

import itertools
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import ReportProgress
from hvd_batchgrow.data.pipeline.reader import choose_pipeline
from hvd_batchgrow.data.sources.specs import known_num_samples
from hvd_batchgrow.nn.networks.registry import check_model
from hvd_batchgrow.schedule.cost.probe_file import (
    Probe,
    RankProbe,
    TimedSum,
    TimedUpdate,
    check_probe,
    load_probe,
    merge_probes,
    save_probe,
    subject_of,
)
from hvd_batchgrow.schedule.layout import Layout
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.train.run.setup import load_together, set_threads
from hvd_batchgrow.train.trainer import Trainer

Tell = Callable[[str], None]
"""Told of progress, on every rank."""

BUDGET_S = 25.0
_ROUNDS = (3, 40)
_SUM_REPEATS = 30


def probe_into(
    path: Path, load: Callable[[], Job], ranks: Ranks, report: ReportProgress, tell: Tell, budget_s: float = BUDGET_S
) -> Probe | None:
    """Probe a job and add the figures to a file, beside those of other numbers of ranks.

    Args:
        path: PROBE.json, which may be there already; only rank 0's is looked at.

    Others as `probe_job`.

    Returns:
        what the file holds now, on rank 0; None on the others.

    Raises:
        CollectiveError: as `probe_job`; or the file is damaged, of something else, or cannot be written.
    """

    def find() -> Probe | None:
        if ranks.rank or not path.exists():
            return None
        found = load_probe(path)
        check_probe(load(), found)
        return found

    old = ranks.run_on_all(find)
    new = probe_job(load, ranks, report, tell, budget_s)

    def gather() -> Probe | None:
        if new is None:
            return None
        merged = merge_probes(old, new)
        save_probe(path, merged)
        return merged

    return ranks.run_on_all(gather)


def probe_job(
    load: Callable[[], Job], ranks: Ranks, report: ReportProgress, tell: Tell, budget_s: float = BUDGET_S
) -> Probe | None:
    """Measure sums over the ranks and whole updates of several shapes. Writes nothing, and trains nothing of use.

    Args:
        load: gives the job; every rank calls it for itself.
        ranks: all of them call this.
        report: told of downloads.
        tell: told of progress.
        budget_s: about how long to measure; no shape is measured fewer than three times.

    Returns:
        the measurements, on rank 0; None on the others.

    Raises:
        CollectiveError: the job cannot be planned, or data or packages are not as they must be.
    """
    job, plan = ranks.run_on_all(lambda: _prepare(load()))
    source = load_together(job, ranks, report)
    set_threads(job, ranks)
    bench = _Bench(Trainer(job, plan, source, ranks, Path(), ()))
    sums = _measure_sums(bench, tell) if ranks.size > 1 else ()
    updates = _measure_updates(bench, tell, budget_s)
    return _probe(bench, sums, updates) if ranks.rank == 0 else None


def _prepare(job: Job) -> tuple[Job, Plan]:
    """The job planned for one rank, on which every batch can be formed: the shapes measured are not the plan's."""
    job = job.model_copy(update={"layout": job.layout.grown_by("accumulation")})
    plan = compile_plan(job, 1, known_num_samples(job.data))
    check_model(job)
    return job, plan


def _probe(bench: _Bench, sums: Sequence[TimedSum], updates: Sequence[TimedUpdate]) -> Probe:
    job, ranks, device = bench.job, bench.ranks, bench.trainer.device
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
        subject=subject_of(job) | {"data.pipeline": choose_pipeline(job.data.pipeline, bench.trainer.source.train)},
        image_shape=bench.trainer.source.train.shape,
        gradient_bytes=bench.gradient_bytes,
        measured=(part,),
    )


# --- updates ---------------------------------------------------------------------------------


class _Bench:
    """A trainer whose updates take any shape; its data run on without an end."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.job, self.ranks = trainer, trainer.job, trainer.ranks
        # Exact sums have two parts, each of twice the bytes.
        per_byte = 4 if self.job.layout.exact else 1
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        self.gradient_bytes = per_byte * sum(p.numel() * p.element_size() for p in parameters)
        self._batches = trainer.open_batches()

    def update(self, micro_batch: int, accumulation: int) -> tuple[float, float]:
        """Do one update; seconds, and those of waiting for data, on this rank."""
        global_batch = self.ranks.size * accumulation * micro_batch
        phase = self.trainer.plan.schedule.phases[0]
        # The weights hardly move: a batch that no schedule asked for must not make them diverge.
        phase = replace(phase, global_batch=global_batch, lr=1e-3 * phase.lr)
        layout = Layout(self.ranks.size, accumulation, micro_batch, uneven_ranks=False)
        result = self.trainer.update(self._batches, phase, layout, stop=False)
        return result.seconds, result.data_wait_s

    def mean(self, values: Sequence[float]) -> tuple[float, ...]:
        """Over the ranks, on all of them."""
        return tuple((self.ranks.sum(torch.tensor(values, dtype=torch.float64), "probe") / self.ranks.size).tolist())


def _measure_updates(bench: _Bench, tell: Tell, budget_s: float) -> list[TimedUpdate]:
    """Every shape in every round, so that what disturbs the machine for a while disturbs all alike; medians."""
    shapes = list(update_shapes(bench.job, on_cpu=bench.trainer.device.type == "cpu"))
    tell(f"updates of {len(shapes)} shapes, once to warm up")
    round_s = _warm_up(bench, shapes)
    rounds = min(_ROUNDS[1], max(_ROUNDS[0], round(budget_s / round_s)))
    blocks: list[list[tuple[float, ...]]] = [[] for _ in shapes]
    for k in range(rounds):
        tell(f"updates, round {k + 1} of {rounds}, {round_s:.1f} s each")
        for block, shape in zip(blocks, shapes, strict=True):
            block.append(_time_block(bench, *shape))
    return [_timed(shape, block) for shape, block in zip(shapes, blocks, strict=True)]


def _warm_up(bench: _Bench, shapes: Sequence[tuple[int, int]]) -> float:
    """Seconds of a round; the first makes libraries choose their kernels, the second is timed."""
    for shape in shapes:
        bench.update(*shape)
    begin = time.perf_counter()
    for shape in shapes:
        _time_block(bench, *shape)
    return bench.mean([time.perf_counter() - begin])[0]


def _time_block(bench: _Bench, micro_batch: int, accumulation: int) -> tuple[float, ...]:
    """Seconds and data wait of an update, means over at least four passes and over the ranks."""
    repeats = max(1, 4 // accumulation)
    results = [bench.update(micro_batch, accumulation) for _ in range(repeats)]
    return bench.mean([sum(column) / repeats for column in zip(*results, strict=True)])


def _timed(shape: tuple[int, int], block: Sequence[tuple[float, ...]]) -> TimedUpdate:
    seconds, data_wait_s = (statistics.median(column) for column in zip(*block, strict=True))
    micro_batch, accumulation = shape
    return TimedUpdate(micro_batch=micro_batch, accumulation=accumulation, seconds=seconds, data_wait_s=data_wait_s)


def update_shapes(job: Job, *, on_cpu: bool) -> Iterator[tuple[int, int]]:
    """Micro-batch and accumulation of the updates to measure.

    The largest micro-batch that the job allows, half and a quarter of it, and one ghost batch; 1, 2,
    4 and 8 passes. Where one ghost batch is all that is allowed, two and four are measured too,
    to tell a pass from a sample, but not on a GPU, whose memory may be what the limit is for.
    """
    group = job.model.ghost_batch
    most = job.micro_batch_limit // group
    for groups in sorted({1, max(1, most // 4), max(1, most // 2), most}):
        yield from ((groups * group, passes) for passes in (1, 2, 4, 8))
    if most == 1 and on_cpu and not job.layout.exact:
        yield from itertools.product((2 * group, 4 * group), (1, 2))


# --- sums ------------------------------------------------------------------------------------


def _measure_sums(bench: _Bench, tell: Tell) -> list[TimedSum]:
    """A quarter and a sixteenth of the gradient, the gradient, and four times it."""
    num_values = max(16, bench.gradient_bytes // 4)
    tell(f"sums over {bench.ranks.size} ranks")
    return [_time_sum(bench, n) for n in (num_values // 16, num_values // 4, num_values, 4 * num_values)]


def _time_sum(bench: _Bench, num_values: int) -> TimedSum:
    values = torch.zeros(num_values, device=bench.trainer.device)
    seconds = []
    for _ in range(_SUM_REPEATS):
        begin = time.perf_counter()
        bench.ranks.sum(values, f"probe.{num_values}")
        seconds.append(time.perf_counter() - begin)
    # The first ones agree on names and buffers.
    (median_s,) = bench.mean([statistics.median(seconds[_SUM_REPEATS // 5 :])])
    return TimedSum(num_bytes=4 * num_values, seconds=median_s)
