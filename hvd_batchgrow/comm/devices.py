"""Assign a device to each rank: a GPU if all ranks see one, otherwise the CPU. All ranks agree on the result."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.messages.errors import UNNAMED, ExitCode, Fault, JobError, faults_of
from hvd_batchgrow.messages.wording import counted, listed
from hvd_batchgrow.storage.strict_json import dump_json

DeviceKey = Literal["auto", "cuda", "cpu"]
"""`layout.device`."""


@dataclass(frozen=True)
class VisibleGpus:
    """The GPUs that one rank sees. Slurm or CUDA_VISIBLE_DEVICES may hide the others of its host."""

    host: str
    uuids: tuple[str, ...]
    """In the order of their indices on this rank."""


_Gpu = tuple[str, str]
"""Host and UUID."""


@dataclass(frozen=True)
class DeviceAssignment:
    """The device of each rank."""

    indices: tuple[int | None, ...]
    """For each rank, the index of its GPU among those that it sees; None: the CPU."""
    gpus_per_host: tuple[int, ...]
    """Number of GPUs that the ranks of each host use."""
    ranks_per_gpu: int = 1
    """Most ranks on one GPU. NCCL allows one."""
    notes: tuple[str, ...] = ()
    """Notices for the user, such as GPUs that are not used."""

    @property
    def is_cuda(self) -> bool:
        """Whether the ranks use GPUs."""
        return self.indices[0] is not None


def assign_devices(seen: Sequence[VisibleGpus], device: DeviceKey, ranks_per_gpu: int | None) -> DeviceAssignment:
    """Assign a device to each rank.

    As few ranks as possible share a GPU. Each rank takes the visible GPU that the fewest ranks of its host have taken,
    the first of several. Ranks that see few GPUs choose before those that see more, and a rank that has chosen moves to
    another GPU if a later one would have to share otherwise. If all see the same, a rank takes number
    `local_rank % visible`. GPUs are distinguished by their UUIDs, because the ranks of a host may see the same ones,
    others, or some in common.

    Args:
        seen: what each rank sees.
        device: `layout.device`.
        ranks_per_gpu: `layout.ranks_per_gpu`, the most ranks that may share a GPU; None: one.

    Raises:
        JobError: some ranks see GPUs and others do not; no rank sees one, and `device` requires them; or more ranks
            than allowed would share one.
    """
    on_cpu = tuple(None for _ in seen)
    no_gpus = (0,) * len({view.host for view in seen})
    if device == "cpu":
        return DeviceAssignment(on_cpu, no_gpus, notes=_unused(seen, set(), 'layout.device = "cpu"'))
    without = [view.host for view in seen if not view.uuids]
    if len(without) == len(seen):
        if device == "cuda":
            raise JobError([Fault("layout.device", f'"cuda": no GPU is visible{_why()}; use "auto" or "cpu"')])
        return DeviceAssignment(on_cpu, no_gpus)
    if without:
        views = dict.fromkeys((view.host, counted(len(view.uuids), "GPU")) for view in seen)
        texts = "; ".join(f"a rank on {host} sees {gpus}" for host, gpus in views)
        fault = f'all ranks must use the same kind of device, but {texts}. Use other hosts, or device = "cpu"'
        raise JobError([Fault("layout.device", fault)])
    limit = ranks_per_gpu or 1
    needed, indices = next((most, found) for most in count(1) if isinstance(found := _choose(seen, most), tuple))
    if needed > limit:
        _refuse_sharing(seen, limit, needed)
    used = Counter((view.host, view.uuids[index]) for view, index in zip(seen, indices, strict=True))
    per_host = tuple(Counter(host for host, _ in used).values())
    return DeviceAssignment(indices, per_host, max(used.values()), _unused(seen, set(used), "one rank uses one GPU"))


def _choose(seen: Sequence[VisibleGpus], most: int) -> tuple[int, ...] | set[_Gpu]:
    """Return the index of each rank's GPU, with at most `most` ranks on each GPU.

    If the GPUs that a rank sees are all taken, one of their ranks moves to another GPU, and so on: the augmenting paths
    of a bipartite matching, which find an assignment if there is one. If not, return GPUs that are too few for the
    ranks that see no others.
    """
    taken: dict[_Gpu, list[int]] = {gpu: [] for view in seen for gpu in _gpus(view)}
    for rank, _ in sorted(enumerate(seen), key=lambda one: len(one[1].uuids)):
        tried: set[_Gpu] = set()
        if not _take(rank, seen, most, taken, tried):
            return tried
    chosen = {rank: gpu for gpu, ranks in taken.items() for rank in ranks}
    return tuple(_gpus(view).index(chosen[rank]) for rank, view in enumerate(seen))


def _take(rank: int, seen: Sequence[VisibleGpus], most: int, taken: dict[_Gpu, list[int]], tried: set[_Gpu]) -> bool:
    """Give a rank a GPU that is not in `tried`, to which this adds; return whether that was possible."""
    for gpu in sorted(_gpus(seen[rank]), key=lambda gpu: len(taken[gpu])):
        if gpu in tried:
            continue
        tried.add(gpu)
        if len(taken[gpu]) == most:
            mover = next((other for other in taken[gpu] if _take(other, seen, most, taken, tried)), None)
            if mover is None:
                continue
            taken[gpu].remove(mover)
        taken[gpu].append(rank)
        return True
    return False


def _gpus(view: VisibleGpus) -> list[_Gpu]:
    return [(view.host, uuid) for uuid in view.uuids]


def _refuse_sharing(seen: Sequence[VisibleGpus], limit: int, needed: int) -> None:
    few = _choose(seen, limit)
    assert isinstance(few, set), "more ranks must share a GPU than the limit"
    ranks = [rank for rank, view in enumerate(seen) if few.issuperset(_gpus(view))]
    host, allowed = seen[ranks[0]].host, limit * len(few)
    if few.issuperset(gpu for view in seen if view.host == host for gpu in _gpus(view)):
        see = f"{counted(len(ranks), 'rank')} {'sees' if len(ranks) == 1 else 'see'} {counted(len(few), 'GPU')}"
        remedy = f"launch {allowed} there"
    else:
        uuids = list(dict.fromkeys(uuid for rank in ranks for uuid in seen[rank].uuids))
        see = f"ranks {listed(ranks)} see no other GPU than {listed(uuids)}"
        remedy = "let them see others"
    fault = (
        f"{limit} allows {counted(allowed, 'rank')} on {host}, where {see}; {remedy}, "
        f"or set layout.ranks_per_gpu = {needed}, which sums gradients over Gloo instead of NCCL"
    )
    raise JobError([Fault("layout.ranks_per_gpu", fault)])


def _unused(seen: Sequence[VisibleGpus], used: set[tuple[str, str]], why: str) -> tuple[str, ...]:
    """Return a notice for each host with GPUs that are visible and not used."""
    visible: dict[str, set[str]] = {}
    for view in seen:
        visible.setdefault(view.host, set()).update(view.uuids)
    idle = {host: sum((host, uuid) not in used for uuid in uuids) for host, uuids in visible.items()}
    return tuple(
        f"{idle[host]} of {len(uuids)} visible GPUs on {host} {'is' if idle[host] == 1 else 'are'} not used: {why}"
        for host, uuids in visible.items()
        if idle[host]
    )


def _why() -> str:
    if torch.version.cuda is None:
        return f" to torch {torch.__version__}, which is a CPU build (HVD_BATCHGROW_CUDA=1 make setup)"
    return " (nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them)"


def visible_gpus() -> VisibleGpus:
    """Return what this rank sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    uuids = tuple(str(torch.cuda.get_device_properties(index).uuid) for index in range(count))
    return VisibleGpus(socket.gethostname(), uuids)


def agree_on_devices(
    ranks: Ranks, device: DeviceKey, ranks_per_gpu: int | None, source: str = UNNAMED
) -> DeviceAssignment:
    """Assign a device to each rank, from what all ranks see; all ranks call it together. Errors name the source.

    The keys of rank 0 count: a rank that cannot read the job has others.

    Raises:
        CollectiveError: as `assign_devices` raises JobError.
    """
    view = visible_gpus()
    texts = ranks.all_gather_bytes(dump_json([view.host, view.uuids, device, ranks_per_gpu]).encode(), "visible GPUs")
    rows = [json.loads(text) for text in texts]
    seen = [VisibleGpus(host, tuple(uuids)) for host, uuids, *_ in rows]

    def assign() -> DeviceAssignment:
        with faults_of(source):
            return assign_devices(seen, *rows[0][2:])

    return ranks.run_on_all(assign)


def why_not_on_gpus(ranks: Ranks, assignment: DeviceAssignment) -> str:
    """Return why these ranks cannot sum gradients on their GPUs; empty if they can, or if they use the CPU."""
    if not assignment.is_cuda or ranks.size == 1:
        return ""
    if not ranks.sums_on_gpu:
        return f"{ranks.backend} cannot sum on GPUs: Horovod is built without NCCL"
    if assignment.ranks_per_gpu > 1 and not ranks.shares_gpus:
        return f"{assignment.ranks_per_gpu} ranks share a GPU, and NCCL, which {ranks.backend} uses, allows one"
    return ""


@dataclass(frozen=True)
class Placement:
    """The device of this rank, and what the user should know about the devices of all ranks."""

    device: torch.device
    gpus_per_host: tuple[int, ...]
    """Number of GPUs that the ranks of each host use."""
    notes: tuple[str, ...] = ()
    """Notices for the user, such as GPUs that are not used."""


def take_device(ranks: Ranks, device: DeviceKey, ranks_per_gpu: int | None, source: str = UNNAMED) -> Placement:
    """Return this rank's device, made torch's current one; all ranks call it together.

    Raises:
        CollectiveError: as `assign_devices` raises JobError; or the job requires GPUs, and the ranks cannot sum there.
    """
    assignment = agree_on_devices(ranks, device, ranks_per_gpu, source)
    if why := why_not_on_gpus(ranks, assignment):
        remedy = "use --backend torch"
        if device == "cuda":
            fault = JobError([Fault("layout.device", f'"cuda": {why}; {remedy}')], source)
            raise CollectiveError(fault if ranks.rank == 0 else None, ExitCode.BAD_JOB)
        unused = f"the visible GPUs are not used: {why}; {remedy}"
        return Placement(torch.device("cpu"), (0,) * len(assignment.gpus_per_host), (unused,))
    index = assignment.indices[ranks.rank]
    if index is None:
        return Placement(torch.device("cpu"), assignment.gpus_per_host, assignment.notes)
    torch.cuda.set_device(index)
    ranks.use_gpus(shared=assignment.ranks_per_gpu > 1)
    return Placement(torch.device("cuda", index), assignment.gpus_per_host, assignment.notes)
