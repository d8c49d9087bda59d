from __future__ import annotations

import sys
import types

import pytest

from hvd_batchgrow.comm import backend
from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.devices import DeviceKey, VisibleGpus, assign_devices
from hvd_batchgrow.comm.launcher_env import (
    GLOO,
    OPEN_MPI,
    OTHER_MPI,
    SRUN_PMIX,
    TORCHRUN,
    is_first_process,
    launched_by,
    launched_ranks,
    unconnected_tasks,
)
from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.comm.rendezvous import derived_port, first_host, meeting_point
from hvd_batchgrow.messages.errors import RunError


@pytest.mark.parametrize(
    ("environment", "launcher", "ranks"),
    [
        ({}, None, (0, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, OPEN_MPI, (3, 4)),
        ({"PMI_SIZE": "3", "PMI_RANK": "1"}, OTHER_MPI, (1, 3)),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"}, GLOO, (1, 2)),
        ({"HOROVOD_SIZE": "", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, OPEN_MPI, (0, 2)),
        ({"SLURM_STEP_NUM_TASKS": "4", "PMIX_RANK": "2"}, SRUN_PMIX, (2, 4)),
        ({"WORLD_SIZE": "4", "RANK": "1", "TORCHELASTIC_RESTART_COUNT": "0"}, TORCHRUN, (1, 4)),
        # torchrun started by srun, once per host; and a script that sets RANK itself
        (
            {"WORLD_SIZE": "4", "RANK": "3", "TORCHELASTIC_RESTART_COUNT": "0"}
            | {"SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "1"},
            TORCHRUN,
            (3, 4),
        ),
        ({"WORLD_SIZE": "4", "RANK": "3"}, None, (0, 1)),
        # srun --mpi=pmi2
        ({"SLURM_STEP_NUM_TASKS": "4", "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "9"}, OTHER_MPI, (3, 4)),
        # hydra in an allocation starts one proxy per node by srun, and its ranks inherit the step's variables
        ({"SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "5", "PMI_SIZE": "8"}, OTHER_MPI, (5, 8)),
        ({"SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "1", "PMI_RANK": "5", "PMI_SIZE": "8"}, OTHER_MPI, (5, 8)),
        # horovodrun --gloo within a step of srun
        (
            {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"}
            | {"SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"},
            GLOO,
            (1, 2),
        ),
        # SLURM's variables describe the step, not the ranks
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, None, (0, 1)),
    ],
)
def test_the_launcher_is_known_by_its_variables(
    environment: dict[str, str], launcher: str | None, ranks: tuple[int, int]
) -> None:
    assert launched_by(environment) == launcher
    assert launched_ranks(environment) == ranks


@pytest.fixture
def no_horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.delitem(sys.modules, "hvd_batchgrow.comm.horovod", raising=False)
    # The module sets these before it imports Horovod.
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "1")


@pytest.mark.usefixtures("no_horovod")
def test_without_horovod_one_rank_works_and_two_fail_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(connect(), SingleRank)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert isinstance(connect("horovod"), SingleRank)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(
        RunError, match=r"(?s)started by mpirun as one of 2 ranks, but Horovod cannot .* --backend torch"
    ):
        connect("horovod")


class TwoRanks(SingleRank):
    """Rank 0 of two that see the same."""

    size, backend = 2, "torch-gloo"

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        return [data, data]


@pytest.fixture
def two_torch_ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    joined = TwoRanks()
    stand_in = types.SimpleNamespace(join=lambda: joined)
    monkeypatch.setitem(sys.modules, "hvd_batchgrow.comm.torch_distributed", stand_in)
    return joined


@pytest.mark.usefixtures("no_horovod")
def test_without_horovod_auto_uses_torch_and_prints_why(
    two_torch_ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert connect("auto") is two_torch_ranks
    assert "Horovod cannot be imported" in capsys.readouterr().err
    assert connect("torch") is two_torch_ranks
    assert not capsys.readouterr().err


def test_horovod_is_the_default_if_it_can_be_imported(two_torch_ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    horovod = TwoRanks()
    monkeypatch.setitem(sys.modules, "hvd_batchgrow.comm.horovod", types.SimpleNamespace(HorovodRanks=lambda: horovod))
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert connect() is horovod
    assert connect("torch") is two_torch_ranks


@pytest.mark.parametrize(
    ("visible", "has_nccl", "device", "ranks_per_gpu", "why"),
    [
        (2, True, "auto", None, ""),
        (2, False, "auto", None, "horovod-mpi cannot sum on GPUs: Horovod is built without NCCL"),
        (2, False, "cuda", None, "horovod-mpi cannot sum on GPUs: Horovod is built without NCCL"),
        (2, False, "cpu", None, ""),
        (0, False, "auto", None, ""),
        (1, True, "auto", 2, "2 ranks share a GPU, and NCCL, which horovod-mpi uses, allows one"),
        (1, True, "auto", None, ""),  # refused later, with the arithmetic
    ],
)
def test_auto_takes_a_backend_that_can_sum_on_the_device(
    two_torch_ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    visible: int,
    has_nccl: bool,
    device: DeviceKey,
    ranks_per_gpu: int | None,
    why: str,
) -> None:
    horovod = TwoRanks()
    horovod.backend, horovod.sums_on_gpu = "horovod-mpi", has_nccl
    monkeypatch.setitem(sys.modules, "hvd_batchgrow.comm.horovod", types.SimpleNamespace(HorovodRanks=lambda: horovod))
    seen = [VisibleGpus("n0", ("GPU-0", "GPU-1")[:visible])] * 2
    assignment = lambda *_: assign_devices(seen, device, ranks_per_gpu)  # noqa: E731
    monkeypatch.setattr(backend, "agree_on_devices", lambda ranks, *keys: ranks.run_on_all(assignment))
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert connect("horovod", device, ranks_per_gpu) is horovod
    assert connect("auto", device, ranks_per_gpu) is (two_torch_ranks if why else horovod)
    assert capsys.readouterr().err == (f"{why}: using torch.distributed instead\n" if why else "")


def test_ranks_of_torchrun_use_torch_distributed(two_torch_ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    assert connect() is two_torch_ranks
    with pytest.raises(RunError, match="Horovod cannot join ranks that torchrun started: use --backend torch"):
        connect("horovod")


def test_ranks_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If mpirun and Horovod use different MPIs, each process sees one rank only."""
    alone = SingleRank()
    monkeypatch.setitem(sys.modules, "hvd_batchgrow.comm.horovod", types.SimpleNamespace(HorovodRanks=lambda: alone))
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"mpirun has started 2 ranks, but single sees 1"):
        connect()


# --- where ranks meet -----------------------------------------------------------------------------------

MPIRUN = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "1177878529"}
SLURM = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[03-04,9],login"}


@pytest.mark.parametrize(
    ("environment", "size", "host", "port"),
    [
        ({"MASTER_ADDR": "a", "MASTER_PORT": "29500"}, 2, "a", 29500),
        (SLURM | {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}, 8, "a", 29500),
        (MPIRUN, 2, "127.0.0.1", derived_port("1177878529")),
        (MPIRUN | {"MASTER_PORT": "29500"}, 2, "127.0.0.1", 29500),
        (MPIRUN | {"MASTER_ADDR": "a"}, 4, "a", derived_port("1177878529")),
        ({"HOROVOD_LOCAL_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_PORT": "9"}, 2, "127.0.0.1", derived_port("9")),
        (SLURM, 8, "gpu03", derived_port("17.0.")),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, 8, "127.0.0.1", derived_port("17.0.")),
    ],
)
def test_ranks_meet_where_their_launchers_variables_say(
    environment: dict[str, str], size: int, host: str, port: int
) -> None:
    assert meeting_point(environment, size) == (host, port)


# hydra's PMI_ID is the rank, not a name of the job
@pytest.mark.parametrize("environment", [{}, {"MASTER_ADDR": "a"}, MPIRUN, {"MASTER_ADDR": "a", "PMI_ID": "1"}])
def test_without_a_host_or_a_port_the_message_says_what_to_set(environment: dict[str, str]) -> None:
    with pytest.raises(RunError, match=r"(?s)the 4 ranks do not know where to meet.*Set MASTER_ADDR to .*MASTER_PORT"):
        meeting_point(environment, 4)
    with pytest.raises(RunError, match="MASTER_PORT must be a port, 1 to 65535, got '70000'"):
        meeting_point(environment | {"MASTER_PORT": "70000"}, 4)


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2994.", True),
        ("Connection reset by peer", True),
        ("Invalid scalar type", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", False),
    ],
)
def test_only_errors_of_a_connection_mean_that_a_rank_is_lost(text: str, is_lost: bool) -> None:
    from hvd_batchgrow.comm.torch_distributed import _lost_rank

    with pytest.raises(RuntimeError) as caught, _lost_rank("gradients.0"):
        raise RuntimeError(text)
    assert isinstance(caught.value, RunError) == is_lost
    notes = [] if is_lost else ["in the collective 'gradients.0'"]
    assert getattr(caught.value, "__notes__", []) == notes


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("a,b", "a"),
        ("gpu[03-10,12],login", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("r1n[1-2]-ib,r2n1-ib", "r1n1-ib"),
        ("r[1-2]n[03,5-9],login", "r1n03"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_derived_ports_are_below_linuxs_ephemeral_ports() -> None:
    ports = {derived_port(f"{job}.0.") for job in range(1000)}
    assert min(ports) >= 15_000
    assert max(ports) < 30_000
    assert len(ports) > 900


def test_tasks_without_an_mpi_plugin_are_refused_and_one_of_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
    assert unconnected_tasks(step) == 4
    assert not is_first_process(step)
    assert is_first_process(step | {"SLURM_PROCID": "0"})
    assert unconnected_tasks({"SLURM_STEP_NUM_TASKS": "1"}) == 0
    # mpirun inside an allocation starts its daemons as a step, and the ranks inherit its variables.
    under_mpirun = step | {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0"}
    assert unconnected_tasks(under_mpirun) == 0
    assert is_first_process(under_mpirun)
    for key, value in step.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RunError, match=r"srun has started 4 tasks without an MPI plugin.*\n  Use srun --mpi=pmix"):
        connect()
