"""Run a training script, and record its optimizer steps and the samples that it reads, as torch sees them.

    python recorder.py FILE NUM_SAMPLES KILL_AT SCRIPT [ARGUMENT ...]

Each rank writes FILE-RANK.json: for each optimizer step the values of the parameter groups, and the sample ids that
were read for it from a dataset of NUM_SAMPLES; and FILE-RANK.pt: the parameters at the end. With KILL_AT > 0, the
process ends at once, as if killed, instead of doing this step (counted from 1).
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from hvd_batchgrow.comm.launcher_env import launched_ranks


class Recorder:
    def __init__(self, num_samples: int, kill_at: int) -> None:
        self.num_samples, self.kill_at = num_samples, kill_at
        self.steps: list[dict[str, Any]] = []
        self.ids: list[int] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self._depth = 0

    def install(self) -> None:
        fetch: Any = _MapDatasetFetcher.fetch

        def recorded_fetch(fetcher: Any, index: list[int]) -> Any:
            if len(fetcher.dataset) == self.num_samples:
                self.ids += index
            return fetch(fetcher, index)

        _MapDatasetFetcher.fetch = recorded_fetch  # type: ignore[method-assign]
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        self._depth += 1
        if self._depth > 1:  # a wrapper's step calls the step of the optimizer that it wraps
            return
        if len(self.steps) + 1 == self.kill_at:
            os._exit(9)
        names = ("lr", "momentum", "betas", "weight_decay")
        groups = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
        self.steps.append({"groups": groups, "ids": self.ids})
        self.ids, self.optimizer = [], optimizer

    def _after(self, *unused: Any) -> None:
        self._depth -= 1

    def write(self, file: str) -> None:
        rank, _ = launched_ranks(os.environ)
        assert self.optimizer
        Path(f"{file}-{rank}.json").write_text(json.dumps(self.steps))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.save([parameter.detach().clone() for parameter in parameters], f"{file}-{rank}.pt")


if __name__ == "__main__":
    out, count, kill, *sys.argv = sys.argv[1:]
    recorder = Recorder(int(count), int(kill))
    recorder.install()
    runpy.run_path(sys.argv[0], run_name="__main__")
    recorder.write(out)
