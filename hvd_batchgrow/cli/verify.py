"""`hvd-batchgrow verify`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.cli.common import RanksCommand, terminal
from hvd_batchgrow.comm.launcher_env import launched_ranks
from hvd_batchgrow.config.layout import KEYS_OF_GROW_BY
from hvd_batchgrow.config.types import PositiveInt
from hvd_batchgrow.interrupt import tidied_up_on_interrupt
from hvd_batchgrow.job_file import override_words
from hvd_batchgrow.messages.errors import ExitCode
from hvd_batchgrow.schedule.plan import compile_plan

_OF_GROWTH = {"layout.grow_by"} | {f"layout.{key}" for keys in KEYS_OF_GROW_BY.values() for key in keys}


@dataclass(frozen=True)
class VerifyCommand(RanksCommand):
    """Run a few updates under several layouts, as real processes, and compare the weights with plain autograd's."""

    layouts: str | None = None
    """Comma-separated RANKSxACCUMULATIONxMICRO-BATCH of the first phase's batch; default: several with 1 to 4 ranks."""
    updates: PositiveInt = 2
    """Number of updates. Rounding grows from one update to the next, so a small number shows more than a large one."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print a table; return 1 if a layout differs by more than rounding, or in exact mode by a single bit."""
        from hvd_batchgrow.comm.devices import visible_gpus
        from hvd_batchgrow.data.load_source import load_source
        from hvd_batchgrow.data.source_checks import known_num_samples
        from hvd_batchgrow.observers.console_tables import print_verify
        from hvd_batchgrow.observers.progress import work_progress
        from hvd_batchgrow.tasks.load_task import target_of
        from hvd_batchgrow.verification.same_device import same_device
        from hvd_batchgrow.verification.verify import default_shapes, find_hazards, parse_shapes, verify

        if launched_ranks(os.environ)[0] > 0:
            return ExitCode.DONE  # under a launcher rank 0 does the work, and starts the ranks of each layout itself
        job = self.load(overrides)
        job = job.model_copy(update={"layout": job.layout.grown_by("accumulation")})  # like the run of each layout
        overrides = {key: value for key, value in overrides.items() if key not in _OF_GROWTH}
        schedule, ghost_batch = compile_plan(job, 1, known_num_samples(job.data)).schedule, job.model.ghost_batch
        phase, num_updates = schedule.phases[0], min(self.updates, schedule.num_updates)
        exact = job.layout.exact
        shapes = (
            parse_shapes(self.layouts, phase.global_batch, ghost_batch, exact=exact)
            if self.layouts
            else default_shapes(phase.global_batch, ghost_batch, exact=exact)
        )
        console = terminal(sys.stderr)
        most, num_gpus = max(shape.ranks for shape in shapes), len(visible_gpus().uuids)
        keys, notice = same_device(job.layout, most, num_gpus, self.backend)
        job = job.model_copy(update={"layout": job.layout.model_copy(update=keys)})
        options = override_words({**overrides, **{f"layout.{key}": value for key, value in keys.items()}})
        if notice:
            console.print(notice, soft_wrap=True)
        if self.seed is not None:
            options += ["--seed", str(self.seed)]
        with work_progress(console) as progress:
            source = load_source(job.data, job.seed, progress, target_of(job.task))
        causes, notes = find_hazards(job, source)

        def report(line: str) -> None:
            console.print(line, soft_wrap=True)

        with tidied_up_on_interrupt():
            results = verify(self.job, job, source, options, shapes, num_updates, report, self.backend)
        out = terminal(sys.stdout)
        print_verify(out, job, results, num_updates)
        for cause in causes:
            line = f"results of {job.model.name} depend on the layout: {cause}"
            out.print(line, soft_wrap=True)
        for note in notes:
            out.print(note, soft_wrap=True)
        return ExitCode.DONE if all(result.passed for result in results) else ExitCode.FAILURE
