"""What torch.distributed alone has to prove: meeting without MPI, losing a peer; and parts of three ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

from tests.launch.test_forms import BIN, ENVIRONMENT, FORMS, TOOLS, folder, run

__all__ = ["folder"]  # a fixture

REPOSITORY = TOOLS.parent


def meeting() -> TCPStore:
    """Where ranks meet, as torchrun serves it: on a port that is taken from the first moment on."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start_rank(folder: Path, rank: int, store: TCPStore, program: str) -> subprocess.Popen[str]:
    """Start one of two ranks with the environment of torchrun, but without a launcher that would end the other."""
    report = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": "0"}
    place = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return subprocess.Popen(
        [sys.executable, "-c", program, "train", "small.toml", "--name", "lost"],
        cwd=folder,
        env=ENVIRONMENT | report | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_rank_whose_peer_is_killed_ends_at_once_and_says_so(folder: Path) -> None:
    die = (
        "import os, signal\n"
        "from hvd_batchgrow.train.update.engine import UpdateEngine\n"
        "UpdateEngine.update = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    start, store = "import sys\nfrom hvd_batchgrow.cli import main\nsys.exit(main())\n", meeting()
    first, second = start_rank(folder, 0, store, start), start_rank(folder, 1, store, die + start)
    second.communicate(timeout=300)
    assert second.returncode == -signal.SIGKILL
    text, _ = first.communicate(timeout=300)  # half of the watchdog's 600 s: the closed connection ends it
    assert first.returncode == 1
    assert "rank 0 of 2 on " in text
    assert "another rank has ended or cannot be reached any more (" in text
    assert "Traceback" not in text


def test_ranks_that_connect_to_a_killed_rank_end_after_a_timeout(folder: Path) -> None:
    """The other torchrun processes do not notice that a rank was killed, so without a timeout the ranks would wait."""
    start = (
        "from datetime import timedelta\n"
        "from hvd_batchgrow.comm import torch_distributed\n"
        "from hvd_batchgrow.comm.backend import connect\n"
    )
    waits = (
        "store = torch_distributed._store\n"
        "def meet(rank, size):\n"
        "    met = store(rank, size)\n"
        "    torch_distributed._JOIN_TIMEOUT = timedelta(seconds=5)\n"
        "    return met\n"
        "torch_distributed._store = meet\n"
        "connect()\n"
    )
    dies = "torch_distributed._store(1, 2)\n"
    store = meeting()
    first, second = start_rank(folder, 0, store, start + waits), start_rank(folder, 1, store, start + dies)
    second.communicate(timeout=300)
    text, _ = first.communicate(timeout=300)
    assert (first.returncode, second.returncode) == (1, 0)
    assert "rank 0 of 2 cannot join the others: one of them has not answered for 5 s" in text


def test_a_rank_that_waits_ends_when_rank_0_is_killed(folder: Path) -> None:
    program = (
        "import os, signal\n"
        "from hvd_batchgrow.comm.backend import connect\n"
        "from hvd_batchgrow.messages.errors import RunError\n"
        "ranks = connect()\n"
        "if ranks.subset(1):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "try:\n"
        "    ranks.wait_until_woken(lambda: False)\n"
        "except RunError as error:\n"
        "    print(error, flush=True)\n"
        "    ranks.abort(7)\n"
    )
    store = meeting()
    first, second = start_rank(folder, 0, store, program), start_rank(folder, 1, store, program)
    first.communicate(timeout=300)
    text, _ = second.communicate(timeout=300)
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, 7)
    assert "rank 0 has ended while this rank waited for its phase" in text


def test_ranks_of_mpirun_meet_without_mpi4py(folder: Path) -> None:
    program = "import sys\nsys.modules['mpi4py'] = None\nfrom hvd_batchgrow.cli import main\nsys.exit(main())\n"
    words = [str(TOOLS / "mpirun.sh"), "2", sys.executable, "-c", program]
    words += ["train", "small.toml", "--name", "no-mpi4py", "--backend", "torch", "--max-updates", "1"]
    done = subprocess.run(words, check=False, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75, done.stderr


def test_horovodruns_ranks_meet_for_torch_too(folder: Path) -> None:
    name = ["--name", "torch-in-horovodrun", "--backend", "torch"]
    done = run(folder, "horovodrun-gloo", "train", "small.toml", *name)
    assert done.returncode == 0, done.stderr


def test_torchrun_is_not_for_horovod(folder: Path) -> None:
    done = run(folder, "torchrun", "train", "small.toml", "--backend", "horovod", "--name", "refused")
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count(
        "Horovod cannot join ranks that torchrun started: use --backend torch"
    ) == 1


def test_no_thread_of_gloo_outlives_the_ranks(tmp_path: Path) -> None:
    """One that lets go of a tensor while Python ends would abort the process: one run in three, once."""
    program = tmp_path / "threads.py"
    program.write_text(
        "import os, torch\n"
        "from hvd_batchgrow.comm.backend import connect\n"
        "import hvd_batchgrow.comm.torch_distributed\n"
        "torch.ones(1) + 1\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "ranks = connect('torch')\n"
        "part = ranks.subset(1)\n"
        "part.close() if part else ranks.wait_until_woken(lambda: False)\n"
        "ranks.all_reduce(torch.ones(3), 'ones')\n"
        "during = len(os.listdir('/proc/self/task'))\n"
        "ranks.close()\n"
        "assert len(os.listdir('/proc/self/task')) == before < during, (before, during)\n"
    )
    words = [*FORMS["torchrun"], sys.executable, str(program)]
    done = subprocess.run(words, check=False, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


LAUNCHERS = {
    "mpirun": [str(TOOLS / "mpirun.sh"), "3"],
    "horovodrun-gloo": [str(BIN / "horovodrun"), "-np", "3", "--gloo"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--no-python", "--nproc-per-node", "3"],
}


@pytest.mark.parametrize(
    ("launcher", "comm"),
    [("mpirun", "horovod"), ("mpirun", "torch"), ("horovodrun-gloo", "horovod"), ("torchrun", "torch")],
)
def test_two_of_three_ranks_are_a_part(tmp_path: Path, launcher: str, comm: str) -> None:
    rank = "${RANK:-${OMPI_COMM_WORLD_RANK:-$HOROVOD_RANK}}"
    pytest_command = f"{sys.executable} -m pytest -q -p no:cacheprovider --basetemp $0.{rank}"
    tests = f"exec {pytest_command} tests/parallel/test_rank_subsets.py"
    done = subprocess.run(
        [*LAUNCHERS[launcher], "bash", "-c", tests, str(tmp_path / "of")],
        check=False,
        cwd=REPOSITORY,
        env=ENVIRONMENT | {"HVD_BATCHGROW_TEST_RANKS": "3", "HVD_BATCHGROW_TEST_COMM": comm},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
