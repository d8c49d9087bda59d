"""`hvd-batchgrow verify`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.cli.common import RanksCommand, terminal
from hvd_batchgrow.config import OF_GROWTH
from hvd_batchgrow.config.types import PositiveInt
from hvd_batchgrow.errors import ExitCode
from hvd_batchgrow.interrupt import tidied_up_on_interrupt
from hvd_batchgrow.job_file import override_words
from hvd_batchgrow.schedule.plan import compile_plan

_OF_GROWTH = {"layout.growth"} | {f"layout.{key}" for keys in OF_GROWTH.values() for key in keys}


@dataclass(frozen=True)
class VerifyCommand(RanksCommand):
    """Do a few updates of a job under several layouts, as real processes, and compare the weights."""

    layouts: str | None = None
    """RANKSxPASSESxMICRO-BATCH of the first phase's batch, with commas between; otherwise some on 1 to 4 ranks."""
    updates: PositiveInt = 2
    """How many updates each; rounding grows from one to the next, so that few tell more than many."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """A table; ends with 1 if a layout decides more than rounding, or in exact mode a bit."""
        from hvd_batchgrow.data.known import known_num_samples
        from hvd_batchgrow.proof.verify import default_shapes, find_hazards, parse_shapes, verify
        from hvd_batchgrow.watch.progress import work_progress
        from hvd_batchgrow.watch.tables import print_table, verify_table

        job = self.load(overrides)
        job = job.model_copy(update={"layout": job.layout.grown_by("accumulation")})  # as each run is told to
        overrides = {key: value for key, value in overrides.items() if key not in _OF_GROWTH}
        phase, group = compile_plan(job, 1, known_num_samples(job.data)).schedule.phases[0], job.model.ghost_batch
        exact = job.layout.exact
        shapes = (
            parse_shapes(self.layouts, phase.global_batch, group, exact=exact)
            if self.layouts
            else default_shapes(phase.global_batch, group, exact=exact)
        )
        options = override_words(overrides)
        console = terminal(sys.stderr)
        if self.seed is not None:
            options += ["--seed", str(self.seed)]
        with work_progress(console) as report:
            causes, notes = find_hazards(job, report)

        def tell(line: str) -> None:
            console.print(line, highlight=False)

        with tidied_up_on_interrupt():
            results = verify(self.job, job, options, shapes, self.updates, tell, self.comm)
        out = terminal(sys.stdout)
        print_table(out, verify_table(job, results, self.updates))
        for cause in causes:
            out.print(f"the layout has a say in {job.model.name}; at {cause}", soft_wrap=True)
        for note in notes:
            out.print(note, soft_wrap=True)
        return ExitCode.DONE if all(result.passed for result in results) else ExitCode.FAILURE
