"""A chain: the phases of a plan as jobs of their own, each on just the nodes that it uses."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.layout import Layout
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.slurm.render import TEMPLATES


@dataclass(frozen=True)
class Link:
    """Phases that follow each other and use the same ranks: one job."""

    first_phase: int
    """From 1; likewise the last."""
    last_phase: int
    ranks: int
    nodes: int
    start_samples: int
    end_samples: int
    num_updates: int

    @property
    def phases(self) -> str:
        """As `train --phases` takes them."""
        return f"{self.first_phase}-{self.last_phase}"

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node: fewer than it has room for, where one node is enough."""
        return self.ranks // self.nodes


def make_links(plan: Plan, nodes_max: int, ranks_per_node: int) -> tuple[Link, ...]:
    """Group the phases of a plan into links.

    Args:
        plan: of the whole run.
        nodes_max: the most nodes that a link may ask for.
        ranks_per_node: how many ranks a node has room for; one node may hold fewer.

    Raises:
        JobError: a phase's ranks are no whole number of nodes, or too many; all such phases, with what would fit.
    """
    if plan.job.is_adaptive:
        template = shlex.quote(str(TEMPLATES / "train.sbatch"))
        remedy = f"as one job: sbatch --nodes=N {template} JOB"
        raise JobError(
            [Fault("schedule.policy", f"'adaptive' has no phases before it trains; {remedy}")], plan.job.name
        )
    faults = [
        Fault(f"phase {k + 1} (from epoch {phase.start_epoch:g})", fault)
        for k, (phase, layout) in enumerate(zip(plan.schedule.phases, plan.layouts, strict=True))
        if phase.num_updates and (fault := _node_fault(layout.ranks, nodes_max, ranks_per_node))
    ]
    if faults:
        raise JobError(faults, plan.job.name)
    return tuple(_link(plan, indices, ranks_per_node) for indices in _runs_of_phases(plan))


def _node_fault(ranks: int, nodes_max: int, ranks_per_node: int) -> str | None:
    lower = ranks // ranks_per_node * ranks_per_node
    if ranks > ranks_per_node and lower != ranks:
        fitting = max(n for n in range(1, ranks_per_node) if ranks % n == 0)
        return (
            f"{ranks} ranks = {ranks / ranks_per_node:.2f} nodes of {ranks_per_node}; nearest: {lower}, "
            f"{lower + ranks_per_node} ranks (layout.ranks_per_phase), or --ranks-per-node {fitting}"
        )
    nodes = -(-ranks // ranks_per_node)
    if nodes > nodes_max:
        return (
            f"{ranks} ranks = {nodes} nodes of {ranks_per_node}, and --nodes-max is {nodes_max}; "
            f"nearest: --nodes-max {nodes}, or at most {nodes_max * ranks_per_node} ranks (layout.max_ranks)"
        )
    return None


def _runs_of_phases(plan: Plan) -> Iterator[list[int]]:
    """Indices of phases that use equal numbers of ranks; a phase without updates goes with those before it."""
    run: list[int] = []
    for k, phase in enumerate(plan.schedule.phases):
        used = {plan.layouts[i].ranks for i in run if plan.schedule.phases[i].num_updates}
        if run and used and phase.num_updates and plan.layouts[k].ranks not in used:
            yield run
            run = []
        run.append(k)
    yield run


def _link(plan: Plan, indices: Sequence[int], ranks_per_node: int) -> Link:
    phases = [plan.schedule.phases[k] for k in indices]
    layouts: list[Layout] = [plan.layouts[k] for k, phase in zip(indices, phases, strict=True) if phase.num_updates]
    return Link(
        first_phase=indices[0] + 1,
        last_phase=indices[-1] + 1,
        ranks=layouts[0].ranks,
        nodes=-(-layouts[0].ranks // ranks_per_node),
        start_samples=phases[0].start_samples,
        end_samples=phases[-1].end_samples,
        num_updates=sum(phase.num_updates for phase in phases),
    )


def chain_job(plan: Plan) -> Job:
    """The job with the ranks of each phase written down, so that every link compiles the same plan."""
    ranks = tuple(layout.ranks for layout in plan.layouts)
    return plan.job.model_copy(update={"layout": plan.job.layout.grown_by("ranks", ranks_per_phase=ranks)})
