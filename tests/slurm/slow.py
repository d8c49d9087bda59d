"""A network that takes its time and may fail, for tests that must meet a run half-way."""

from __future__ import annotations

import os
import signal
import sys
import time

from torch import Tensor, nn

from hvd_batchgrow.nn.networks import small_conv_net


class Slow(nn.Module):
    """`small_conv_net` that raises on rank FAIL_RANK at its third pass, or is killed on KILL_RANK, and in the first
    attempt of a job sleeps for SLOW_S seconds a pass, on rank SLOW_RANK or on all.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = small_conv_net.build(1, num_classes, channels=(4, 8), ghost_batch=8, bn_momentum=0.1)
        self.rank = next((os.environ[key] for key in _RANKS if key in os.environ), "0")
        is_slow = os.environ.get("SLOW_RANK", self.rank) == self.rank and "SLURM_RESTART_COUNT" not in os.environ
        self.seconds = float(os.environ.get("SLOW_S", "0")) * is_slow
        self.fails = os.environ.get("FAIL_RANK") == self.rank
        self.dies = os.environ.get("KILL_RANK") == self.rank
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] >= 8 and self.training:  # trials before training have fewer samples than a ghost batch
            self.passes += 1
            if self.fails and self.passes == 3:
                print(f"raised at {time.time():.1f}", file=sys.stderr, flush=True)
                raise ZeroDivisionError("planted")
            if self.dies and self.passes == 3:
                print(f"killed at {time.time():.1f}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
        return self.net(x)  # type: ignore[no-any-return]


_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "HOROVOD_RANK")
