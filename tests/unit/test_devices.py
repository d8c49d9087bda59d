"""Which device each rank gets, from what the ranks see."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hvd_batchgrow.comm import devices
from hvd_batchgrow.comm.devices import DeviceKey, Placement, VisibleGpus, agree_on_devices, assign_devices, take_device
from hvd_batchgrow.comm.ranks import CollectiveError, SingleRank
from hvd_batchgrow.comm.torch_distributed import TorchRanks
from hvd_batchgrow.messages.errors import JobError
from tests.helpers import small_job

CPU = torch.device("cpu")


def on(host: str, *uuids: str) -> VisibleGpus:
    return VisibleGpus(host, uuids)


def masked(ranks: int, host: str = "a") -> list[VisibleGpus]:
    """Each rank sees one separate GPU, as with Slurm's --gpus-per-task=1."""
    return [on(host, f"GPU-{host}{rank}") for rank in range(ranks)]


def whole(ranks: int, gpus: int, host: str = "a") -> list[VisibleGpus]:
    """Every rank sees all GPUs of the host."""
    return [on(host, *(f"GPU-{host}{gpu}" for gpu in range(gpus)))] * ranks


def test_the_keys_of_rank_0_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that cannot read the job has the default keys; it must not expect GPUs where the others use the CPU."""

    class Second(SingleRank):
        def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
            return [json.dumps(["a", ["GPU-1"], "cpu", None]).encode(), data]

    monkeypatch.setattr(devices, "visible_gpus", lambda: on("a", "GPU-1"))
    assert not agree_on_devices(Second(), "auto", 2).is_cuda
    assert agree_on_devices(SingleRank(), "auto", 2).is_cuda


@pytest.mark.parametrize(
    ("seen", "indices"),
    [
        (masked(4), (0, 0, 0, 0)),
        (whole(4, 4), (0, 1, 2, 3)),
        (masked(2, "a") + masked(2, "b"), (0, 0, 0, 0)),
        (whole(2, 2, "a") + whole(2, 2, "b"), (0, 1, 0, 1)),
        # Ranks alternate between the hosts.
        ([on("a", "0", "1"), on("b", "2", "3"), on("a", "0", "1"), on("b", "2", "3")], (0, 0, 1, 1)),
        # Each socket's ranks see its two GPUs.
        ([on("a", "0", "1"), on("a", "0", "1"), on("a", "2", "3"), on("a", "2", "3")], (0, 1, 0, 1)),
        # Ranks alternate between the sockets, each with its GPUs.
        ([on("a", "0", "1"), on("a", "2", "3"), on("a", "0", "1"), on("a", "2", "3")], (0, 0, 1, 1)),
        # Each rank sees the same GPUs, its own first.
        ([on("a", "0", "1"), on("a", "1", "0")], (0, 0)),
        # The second rank sees one GPU only, so the first takes the other one.
        ([on("a", "0", "1"), on("a", "0")], (1, 0)),
        # The ranks that see C must leave B to the first one: it takes A at first, and moves.
        ([on("a", "A", "B"), on("a", "A", "C"), on("a", "A", "C")], (1, 1, 0)),
        # Two moves: rank 0 is the only one that sees D, and rank 1 takes B from it.
        ([on("a", "B", "D"), on("a", "A", "B"), on("a", "A", "C"), on("a", "A", "C")], (1, 1, 1, 0)),
        # The same on a second host, with GPUs of the same names.
        ([on(host, *gpus) for host in "ab" for gpus in ("AB", "AC", "AC")], (1, 1, 0, 1, 1, 0)),
        (whole(0, 0) + [on("a")] * 3, (None, None, None)),
    ],
)
def test_each_rank_gets_a_separate_gpu_or_the_cpu(seen: list[VisibleGpus], indices: tuple[int | None, ...]) -> None:
    found = assign_devices(seen, "auto", None)
    assert found.indices == indices
    assert (found.ranks_per_gpu, found.notes) == (1, ())


@pytest.mark.parametrize(
    ("seen", "device", "note"),
    [
        (whole(1, 2), "auto", "1 of 2 visible GPUs on a is not used: one rank uses one GPU"),
        (whole(1, 4), "cuda", "3 of 4 visible GPUs on a are not used: one rank uses one GPU"),
        (masked(4), "cpu", '4 of 4 visible GPUs on a are not used: layout.device = "cpu"'),
    ],
)
def test_a_gpu_that_is_not_used_is_never_silent(seen: list[VisibleGpus], device: str, note: str) -> None:
    assert assign_devices(seen, device, None).notes == (note,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "limit", "message"),
    [
        (
            whole(4, 2),
            None,
            "layout.ranks_per_gpu: 1 allows 2 ranks on a, where 4 ranks see 2 GPUs; launch 2 there, "
            "or set layout.ranks_per_gpu = 2, which sums gradients over Gloo instead of NCCL",
        ),
        # Every rank sees the same GPU: a count of one GPU per rank would not show it.
        (whole(4, 1), None, "1 allows 1 rank on a, where 4 ranks see 1 GPU; launch 1 there, or set"),
        (
            whole(4, 1),
            2,
            "2 allows 2 ranks on a, where 4 ranks see 1 GPU; launch 2 there, or set layout.ranks_per",
        ),
        (whole(2, 2, "a") + whole(2, 1, "b"), None, "1 allows 1 rank on b, where 2 ranks see 1 GPU"),
        # Enough GPUs on the host, but not for three of its ranks.
        (
            [on("a", "A", "B"), on("a", "C", "D"), on("a", "B", "A"), on("a", "A"), on("b", "A", "B")],
            None,
            "1 allows 2 ranks on a, where ranks 0, 2, 3 see no other GPU than A, B; let them see others, "
            "or set layout.ranks_per_gpu = 2, which",
        ),
    ],
)
def test_more_ranks_than_gpus_are_refused_with_the_arithmetic(
    seen: list[VisibleGpus], limit: int | None, message: str
) -> None:
    with pytest.raises(JobError) as caught:
        assign_devices(seen, "auto", limit)
    assert message in str(caught.value)


def test_ranks_share_gpus_if_the_job_allows_it() -> None:
    found = assign_devices(whole(4, 2), "auto", 2)
    assert (found.indices, found.ranks_per_gpu) == ((0, 1, 0, 1), 2)
    # Permission to share does not make ranks share.
    assert assign_devices(whole(2, 2), "auto", 2).ranks_per_gpu == 1
    found = assign_devices([on("a", "A", "B"), on("a", "A", "C"), on("a", "A", "C")], "auto", 2)
    assert (found.indices, found.ranks_per_gpu) == ((1, 1, 0), 1)


def test_the_gpus_of_each_host_are_in_the_order_of_the_ranks() -> None:
    assert assign_devices(whole(4, 4, "a") + whole(2, 2, "b"), "auto", None).gpus_per_host == (4, 2)


@pytest.mark.parametrize("seed", range(40))
def test_an_assignment_is_found_if_there_is_one(seed: int) -> None:
    """Against all possible choices of 4 ranks."""
    generator = np.random.default_rng(seed)
    seen = [on("a", *generator.permutation([*"ABCDE"])[: generator.integers(1, 4)].tolist()) for _ in range(4)]
    least = min(max(Counter(gpus).values()) for gpus in itertools.product(*(view.uuids for view in seen)))
    found = assign_devices(seen, "auto", 4)
    used = Counter(view.uuids[index] for view, index in zip(seen, found.indices, strict=True) if index is not None)
    assert max(used.values()) == found.ranks_per_gpu == least
    if least > 1:
        with pytest.raises(JobError, match=rf"or set layout.ranks_per_gpu = {least}, which"):
            assign_devices(seen, "auto", least - 1)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_mix_of_devices_is_refused_and_names_the_hosts(device: str) -> None:
    with pytest.raises(JobError) as caught:
        assign_devices([*whole(2, 4, "a"), on("b"), on("b")], device, None)  # type: ignore[arg-type]
    assert "a rank on a sees 4 GPUs; a rank on b sees 0 GPUs. Use other hosts" in str(caught.value)
    assert assign_devices([*whole(2, 4, "a"), on("b")], "cpu", None).indices == (None, None, None)


def test_a_gpu_is_not_mistaken_for_a_cpu() -> None:
    with pytest.raises(JobError, match=r"layout\.device: a GPU is called 'cuda', got 'gpu'$"):
        small_job(layout={"device": "gpu"})


def test_an_error_names_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible_gpus", lambda: on("a"))
    with pytest.raises(CollectiveError) as caught:
        take_device(SingleRank(), "cuda", None, "my_run")
    assert str(caught.value).startswith("my_run: 1 fault\n  layout.device: ")


def test_a_job_that_requires_gpus_does_not_train_on_the_cpu() -> None:
    with pytest.raises(JobError, match=r'layout\.device: "cuda": no GPU is visible.*; use "auto" or "cpu"'):
        assign_devices([on("a")], "cuda", None)


class Seeing(SingleRank):
    """A rank of several on one host or more, each of which sees some GPUs."""

    sums_on_gpu = True

    def __init__(self, backend: str, rank: int, seen: Sequence[VisibleGpus]) -> None:
        self.backend, self.shares_gpus = backend, backend.startswith("torch")
        self.rank, self.size = rank, len(seen)
        self._seen = [[view.host, [*view.uuids]] for view in seen]

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        mine = json.loads(data)
        assert mine[:2] == self._seen[self.rank]
        return [json.dumps([*view, *mine[2:]]).encode() for view in self._seen]


REFUSED = "layout.ranks_per_gpu: 1 allows"
MIXED = "all ranks must use the same kind of device"


@pytest.mark.parametrize("backend", ["horovod-mpi", "torch-gloo"])
@pytest.mark.parametrize(
    ("seen", "device", "expected"),
    [
        pytest.param(masked(4), "auto", [0, 0, 0, 0], id="4 ranks see one GPU each, all different"),
        pytest.param(whole(4, 1), "auto", f"{REFUSED} 1 rank on a, where 4 ranks see 1 GPU", id="4 ranks see the same"),
        pytest.param(whole(4, 4), "auto", [0, 1, 2, 3], id="4 ranks see 4 GPUs"),
        pytest.param(whole(4, 2), "auto", f"{REFUSED} 2 ranks on a, where 4 ranks see 2 GPUs", id="4 ranks see 2"),
        pytest.param(whole(1, 2), "auto", [0], id="a workstation with 2 GPUs"),
        pytest.param([on("a")] * 2, "auto", [None, None], id="no GPU"),
        pytest.param([on("a")] * 2, "cuda", 'layout.device: "cuda": no GPU is visible', id="no GPU, but required"),
        pytest.param(whole(2, 2, "a") + whole(2, 2, "b"), "auto", [0, 1, 0, 1], id="2 equal hosts"),
        pytest.param(whole(3, 4, "a") + whole(1, 1, "b"), "auto", [0, 1, 2, 0], id="unequal hosts, a GPU for each"),
        pytest.param(
            whole(2, 2, "a") + whole(2, 1, "b"), "auto", f"{REFUSED} 1 rank on b, where 2", id="a host lacks GPUs"
        ),
        pytest.param([*whole(2, 2, "a"), on("b")], "auto", MIXED, id="a host without GPUs"),
        pytest.param([*whole(2, 2, "a"), on("b")], "cpu", [None] * 3, id="a host without GPUs, on the CPU"),
    ],
)
def test_every_rank_takes_its_device_or_all_refuse(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    seen: list[VisibleGpus],
    device: DeviceKey,
    expected: list[int | None] | str,
) -> None:
    """The cases of docs/launching.md, with both backends."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for rank, view in enumerate(seen):
        monkeypatch.setattr(devices, "visible_gpus", lambda view=view: view)
        ranks = Seeing(backend, rank, seen)
        if isinstance(expected, str):
            with pytest.raises(CollectiveError) as caught:
                take_device(ranks, device, None, "my_run")
            assert expected in str(caught.value)
            continue
        index = expected[rank]
        assert take_device(ranks, device, None).device == (CPU if index is None else torch.device("cuda", index))
    used = [] if isinstance(expected, str) else [index for index in expected if index is not None]
    assert current == used


@pytest.mark.parametrize(
    ("backend", "device", "why"),
    [
        ("torch-gloo", "cuda:0", None),
        ("horovod-mpi", "cpu", "2 ranks share a GPU, and NCCL, which horovod-mpi uses, allows one; use --backend to"),
    ],
)
def test_ranks_share_a_gpu_over_torch_distributed_only(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, why: str | None
) -> None:
    seen = whole(4, 2)
    monkeypatch.setattr(devices, "visible_gpus", lambda: seen[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    found = take_device(Seeing(backend, 2, seen), "auto", 2)
    assert found.device == torch.device(device)
    assert found.gpus_per_host == ((0,) if why else (2,))
    assert [why in note for note in found.notes] == [True] if why else not found.notes


class Pair(SingleRank):
    """Rank 1 of two on one host that sees what it sees."""

    rank, size, local_rank, local_size, backend = 1, 2, 1, 2, "horovod-mpi"
    sums_on_gpu = False

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        return [data, data]


def test_gpus_on_which_the_ranks_cannot_sum_are_reported_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible_gpus", lambda: on("a", "0", "1"))
    found = take_device(Pair(), "auto", None)
    why = "horovod-mpi cannot sum on GPUs: Horovod is built without NCCL; use --backend torch"
    assert found == Placement(CPU, (0,), (f"the visible GPUs are not used: {why}",))
    assert take_device(Pair(), "cpu", None).device == CPU
    with pytest.raises(CollectiveError):
        take_device(Pair(), "cuda", None)


@pytest.mark.parametrize(("visible", "shared", "index"), [(("0", "1"), False, 1), (("0",), True, 0)])
def test_the_device_is_current_before_anything_uses_it(
    monkeypatch: pytest.MonkeyPatch, visible: tuple[str, ...], shared: bool, index: int
) -> None:
    done: list[object] = []
    pair = Pair()
    pair.sums_on_gpu = pair.shares_gpus = True
    pair.use_gpus = lambda *, shared: done.append(("shared", shared))  # type: ignore[method-assign]
    monkeypatch.setattr(devices, "visible_gpus", lambda: on("a", *visible))
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    assert take_device(pair, "auto", 2) == Placement(torch.device("cuda", index), (len(visible),))
    assert done == [index, ("shared", shared)]


def test_nccl_connects_the_ranks_while_they_are_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would at the first all-reduce, for which a rank that compiles its network may come too late."""
    done = []
    ranks = object.__new__(TorchRanks)
    ranks.backend, ranks.size, ranks.rank, ranks._backends, ranks._parts = "torch-gloo", 2, 0, "gloo", {}
    monkeypatch.setattr(torch, "zeros", lambda size, device: done.append(device))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "new_group", lambda *_, backend, **__: done.append(backend))
    monkeypatch.setattr(TorchRanks, "all_reduce", lambda self, tensor, name: done.append(name))
    monkeypatch.setattr(
        TorchRanks, "__init__", lambda self, group, hosts, backends: setattr(self, "_backends", backends)
    )
    ranks.use_gpus(shared=False)
    assert done == ["cpu:gloo,cuda:nccl", "cuda", "connect GPUs"]
    ranks.reinit([0], b"")
    assert done[3:] == done[:3]
