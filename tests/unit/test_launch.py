from __future__ import annotations

import sys
import types

import pytest

from hvd_batchgrow.comm.launch import (
    GLOO,
    OPEN_MPI,
    OTHER_MPI,
    SRUN_PMI2,
    SRUN_PMIX,
    launched_by,
    launched_ranks,
    lone_tasks,
    speaks,
)
from hvd_batchgrow.comm.ranks import SingleRank, connect
from hvd_batchgrow.errors import RunError


@pytest.mark.parametrize(
    ("environment", "launcher", "ranks"),
    [
        ({}, None, (0, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, OPEN_MPI, (3, 4)),
        ({"PMI_SIZE": "3", "PMI_RANK": "1"}, OTHER_MPI, (1, 3)),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"}, GLOO, (1, 2)),
        ({"HOROVOD_SIZE": "", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, OPEN_MPI, (0, 2)),
        ({"SLURM_STEP_NUM_TASKS": "4", "PMIX_RANK": "2"}, SRUN_PMIX, (2, 4)),
        ({"SLURM_STEP_NUM_TASKS": "4", "PMI_RANK": "3", "PMI_FD": "9"}, SRUN_PMI2, (3, 4)),
        # SLURM's variables are of the step, not of the ranks
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


@pytest.mark.usefixtures("no_horovod")
def test_without_horovod_one_rank_works_and_more_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(connect(), SingleRank)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert isinstance(connect(), SingleRank)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"started by mpirun as one of 2 ranks, but Horovod cannot be imported"):
        connect()


def test_ranks_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun of one MPI, Horovod built with another: each process would think that it is alone."""
    alone = SingleRank()
    monkeypatch.setitem(sys.modules, "hvd_batchgrow.comm.horovod", types.SimpleNamespace(HorovodRanks=lambda: alone))
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"mpirun has started 2 ranks, and Horovod sees 1"):
        connect()


def test_tasks_without_an_mpi_plugin_are_refused_and_one_of_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
    assert lone_tasks(step) == 4
    assert not speaks(step)
    assert speaks(step | {"SLURM_PROCID": "0"})
    assert lone_tasks({"SLURM_STEP_NUM_TASKS": "1"}) == 0
    # mpirun inside an allocation starts its daemons as a step, which ranks inherit the variables of.
    under_mpirun = step | {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0"}
    assert lone_tasks(under_mpirun) == 0
    assert speaks(under_mpirun)
    for key, value in step.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RunError, match=r"srun has started 4 tasks without an MPI plugin.*\n  Say srun --mpi=pmix"):
        connect()
