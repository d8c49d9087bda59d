"""What our patch adds to Horovod, and training where Horovod is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.launch.test_forms import BIN, ENVIRONMENT, FORMS, folder

__all__ = ["folder"]  # a fixture

REINITIALIZE = """
import horovod.torch as hvd
import torch

for k in range(20):
    hvd.init()
    total = hvd.allreduce(torch.tensor([hvd.rank() + k]), op=hvd.Sum, name="total")
    assert total.tolist() == [0 + 1 + 2 + 3 + 4 * k], total
    hvd.shutdown()
print("twenty times")
"""


def test_horovod_starts_and_ends_twenty_times_under_one_horovodrun(tmp_path: Path) -> None:
    # Unpatched, the rendezvous server clears the lists of all scopes as soon as one scope is complete, so that a
    # later init reads addresses of an earlier one. With four ranks, the second or third init fails.
    words = [str(BIN / "horovodrun"), "-np", "4", "--gloo", sys.executable, "-c", REINITIALIZE]
    done = subprocess.run(
        words, check=False, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("twenty times") == 4


def test_without_horovod_ranks_of_mpirun_train_over_torch_distributed_and_say_so(folder: Path) -> None:
    hidden = folder / "hidden" / "horovod"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('not built')\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{hidden.parent}:{ENVIRONMENT.get('PYTHONPATH', '')}"}
    words = [*FORMS["mpirun"], str(BIN / "hvd-batchgrow"), "train", "small.toml", "--name", "without"]
    done = subprocess.run(words, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Horovod cannot be imported (not built): using torch.distributed instead") == 1
    attempt = json.loads((folder / "runs" / "without" / "record.json").read_text())["attempts"][0]
    assert (attempt["ranks"], attempt["backend"]) == (2, "torch-gloo")


SWITCH = """
import os
from pathlib import Path
import torch
from hvd_batchgrow.comm import backend, devices

gpu = f"GPU-{os.environ['OMPI_COMM_WORLD_RANK']}"
devices.visible_gpus = lambda: devices.VisibleGpus("n1", (gpu,))
ranks = backend.connect("auto")
Path(f"rank-{ranks.rank}").write_text(f"{ranks.backend} {ranks.all_reduce(torch.ones(1), 'ones').item()}")
ranks.close()
"""


def test_ranks_with_gpus_leave_a_horovod_that_cannot_sum_there(tmp_path: Path) -> None:
    words = [*FORMS["mpirun"], sys.executable, "-c", SWITCH]
    done = subprocess.run(
        words, check=False, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # In files: mpirun may mix what two ranks print within a line.
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["torch-gloo 2.0"] * 2
    why = "horovod-mpi cannot sum on GPUs: Horovod is built without NCCL: using torch.distributed instead"
    assert done.stderr.count(why) == 1
