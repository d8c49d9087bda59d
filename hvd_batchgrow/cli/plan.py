"""`hvd-batchgrow plan`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import tomli_w

from hvd_batchgrow.cli.common import JobCommand, plan_twin, terminal
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.types import NumRanks
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError
from hvd_batchgrow.schedule.adaptive.decisions import Decision, check_replay, read_decisions
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.twin import decay_twin, weight_decay_note
from hvd_batchgrow.storage.strict_json import dump_json

if TYPE_CHECKING:  # torch takes seconds to import, and `plan` does without it
    from hvd_batchgrow.schedule.cost.cost import Cost
    from hvd_batchgrow.schedule.cost.cost_file import CostFile
    from hvd_batchgrow.schedule.cost.sensitivity import Variation
    from hvd_batchgrow.schedule.stage_layouts import ChooseRanks


@dataclass(frozen=True)
class PlanCommand(JobCommand):
    """Print what a job would do, phase by phase. The data is read only if the number of samples is unknown."""

    ranks: NumRanks = 1
    """Number of available ranks."""
    json: bool = False
    """Print JSON instead of tables."""
    twin: bool = False
    """Print only the job file of the twin that decays the learning rate."""
    plot: Optional[Path] = None
    """Plot learning rate, batch and noise scale to a .png, .svg or .pdf file."""
    cost: Optional[Path] = None
    """A file written by `probe`, or a MACHINE.toml with published figures: predict seconds and rank-hours, and choose
    the ranks of layout.grow_by = "auto"."""
    sensitivity: bool = False
    """With --cost: also print the time and rank-hours with half and twice the compute speed, bandwidth and latency."""
    replay: Optional[Path] = None
    """decisions.jsonl of a run with a trigger, or its folder: plan the schedule that it decided, and its twin."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print the plan of the job and of its decay twin."""
        from hvd_batchgrow.data.source_checks import known_num_samples

        if ignored := [flag for flag, value in (("--json", self.json), ("--plot", self.plot)) if self.twin and value]:
            fault = "contradicts --twin, which only prints a job file"
            raise JobError([Fault(flag, fault) for flag in ignored], "command line")
        if self.sensitivity and (self.cost is None or self.twin):
            raise JobError([Fault("--sensitivity", "needs --cost, and contradicts --twin")], "command line")
        job = self.load(overrides)
        if job.logging.observers:
            from hvd_batchgrow.observers.load_observers import check_observers

            check_observers(job.logging.observers)
        num_samples = known_num_samples(job.data)
        figures = self.figures()
        decisions = self.decisions(job)
        plan = compile_plan(job, self.ranks, num_samples, self.choice(job, num_samples, figures), decisions)
        if self.twin:
            self.print_twin(None if job.schedule.is_own_twin else decay_twin(job, num_samples, decisions))
            return ExitCode.DONE
        twin, no_twin = self.twin_plan(plan, figures)
        plans = [plan, *([twin] if twin else [])]
        if self.plot:
            from hvd_batchgrow.observers.plot import plot_plans

            plot_plans(plans[::-1], self.plot, no_twin)
        costs, changes = self.costs(plans, figures)
        show = self.print_json if self.json else self.print_tables
        show(plans, costs, changes, no_twin)
        return ExitCode.DONE

    def figures(self) -> CostFile | None:
        """Return the content of --cost."""
        if self.cost is None:
            return None
        from hvd_batchgrow.schedule.cost.cost_file import load_cost_file

        return load_cost_file(self.cost)

    def choice(self, job: Job, num_samples: int, figures: CostFile | None) -> ChooseRanks | None:
        """Return the choice of ranks by cost."""
        if figures is None:
            return None
        from hvd_batchgrow.schedule.cost.cost import choose_ranks

        return choose_ranks(job, num_samples, figures, self.ranks)

    def costs(self, plans: Sequence[Plan], figures: CostFile | None) -> tuple[list[Cost], list[tuple[Variation, ...]]]:
        """Return the cost of each plan and, with --sensitivity, how it changes."""
        if figures is None:
            return [], []
        from hvd_batchgrow.schedule.cost.branch_round import round_notes
        from hvd_batchgrow.schedule.cost.cost import predict
        from hvd_batchgrow.schedule.cost.sensitivity import sensitivity

        costs = [predict(plan, figures) for plan in plans]
        notes = [*costs[0].notes, *round_notes(plans[0], figures)]
        if plans[0].job.is_adaptive and not plans[0].decisions:
            notes.append("as if the trigger never decided; --replay DECISIONS predicts the cost of a recorded growth")
        costs[0] = replace(costs[0], notes=tuple(notes))
        return costs, [sensitivity(plan, figures) for plan in plans] if self.sensitivity else []

    def twin_plan(self, plan: Plan, figures: CostFile | None) -> tuple[Plan | None, str | None]:
        """Return the plan of the twin, or the reason why the job has no twin: the job itself is planned anyway."""
        if plan.job.schedule.is_own_twin:
            return None, None
        try:
            return plan_twin(plan.job, self.ranks, plan.num_samples, figures, plan.decisions), None
        except JobError as error:
            return None, "; ".join(fault.message for fault in error.faults)

    def decisions(self, job: Job) -> tuple[Decision, ...]:
        """Return the decisions to replay."""
        if self.replay is None:
            return ()
        check_replay(job, str(self.job))
        return read_decisions(self.replay)[1]

    def print_twin(self, twin: Job | None) -> None:
        """Print the twin as a job file."""
        if twin is None:
            raise JobError([Fault("schedule.policy", "'decay' is its own twin")], str(self.job))
        print(tomli_w.dumps(twin.model_dump(mode="json", exclude_none=True)))

    def print_json(
        self, plans: Sequence[Plan], costs: Sequence[Cost], changes: Sequence[Sequence[Variation]], no_twin: str | None
    ) -> None:
        """Print the plan and its twin's, each with its cost; without a twin, `twin` is null and `no_twin` says why."""
        trees = [plan.to_dict() for plan in plans]
        for tree, cost in zip(trees, costs, strict=False):
            tree["cost"] = cost.to_dict()
        for tree, variations in zip(trees, changes, strict=False):
            tree["cost"]["sensitivity"] = [variation.to_dict() for variation in variations]
        if len(plans) > 1:
            trees[0] |= {"twin": trees[1], "updates_ratio": plans[1].num_updates / plans[0].num_updates}
            if note := weight_decay_note(*plans):
                trees[0]["notes"] = [*trees[0]["notes"], note]
        if no_twin:
            trees[0] |= {"twin": None, "no_twin": no_twin}
        print(dump_json(trees[0], indent=2))

    def print_tables(
        self, plans: Sequence[Plan], costs: Sequence[Cost], changes: Sequence[Sequence[Variation]], no_twin: str | None
    ) -> None:
        """Print tables, the transitions between phases, and how many updates the job saves over its twin."""
        from hvd_batchgrow.observers.console import NOTE
        from hvd_batchgrow.observers.console_tables import cost_table, print_plan, print_table, sensitivity_table
        from hvd_batchgrow.schedule.transitions import describe_transitions

        console = terminal(sys.stdout)
        printed: set[str] = set()
        for plan in plans:
            print_plan(console, plan)
            for line in [*describe_transitions(plan), *plan.job.optim.describe_groups()]:
                console.paragraph(line, indent=2)
            for note in [note for note in plan.notes if note not in printed]:
                printed.add(note)
                console.paragraph(note, NOTE, indent=2)
            console.print()
        if len(plans) > 1:
            ratio = plans[1].num_updates / plans[0].num_updates
            console.print(f"{ratio:.2f}× fewer updates than the twin")
            if confounded := weight_decay_note(*plans):
                console.paragraph(confounded, NOTE)
        if no_twin:
            console.paragraph(no_twin)
        for plan, cost in zip(plans, costs, strict=False):
            print_table(console, cost_table(plan.job.name, cost))
        for plan, variations in zip(plans, changes, strict=False):
            print_table(console, sensitivity_table(plan.job.name, variations))
        for note in dict.fromkeys(note for cost in costs for note in cost.notes):
            console.paragraph(note, NOTE)
