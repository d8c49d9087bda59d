"""Split the phases of a plan into the Slurm jobs of a chain, each on exactly the nodes that it uses."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.layout import Layout, fills_nodes, formable_ranks
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.schedule.stage_layouts import layout_for
from hvd_batchgrow.slurm.render import TEMPLATES


@dataclass(frozen=True)
class ChainJob:
    """One job of a chain: consecutive phases that use the same number of ranks."""

    first_phase: int
    """Counted from 1, as `last_phase`."""
    last_phase: int
    ranks: int
    nodes: int
    start_samples: int
    end_samples: int
    num_updates: int

    @property
    def phases(self) -> str:
        """The value of `train --phases`."""
        return f"{self.first_phase}-{self.last_phase}"

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node; below the capacity of a node if one node is enough."""
        return self.ranks // self.nodes


def make_chain_jobs(plan: Plan, nodes_max: int, ranks_per_node: int) -> tuple[ChainJob, ...]:
    """Group the phases of a plan into chain jobs.

    Args:
        plan: of the whole run.
        nodes_max: the largest number of nodes that a chain job may request.
        ranks_per_node: the capacity of a node; a single node may have fewer ranks.

    Raises:
        JobError: the ranks of a phase do not fill whole nodes, or exceed them; lists all such phases and what fits.
    """
    if plan.job.is_adaptive:
        template = shlex.quote(str(TEMPLATES / "train.sbatch"))
        remedy = f"as one job: sbatch --nodes=N --ntasks-per-node=R {template} JOB --resume auto"
        raise JobError(
            [Fault("schedule.policy", f"'adaptive' determines its phases during training; {remedy}")], plan.job.name
        )
    faults = [
        Fault(f"phase {k} (from epoch {phase.start_epoch:g})", fault)
        for k, phase, layout in plan.trained_phases
        if (fault := _node_fault(plan, phase, layout.ranks, nodes_max, ranks_per_node))
    ]
    if faults:
        raise JobError(faults, plan.job.name)
    return tuple(_chain_job(plan, indices, ranks_per_node) for indices in _runs_of_phases(plan))


def on_whole_nodes(plan: Plan, ranks_per_node: int) -> Plan:
    """Return a plan in which derived ranks fit on one node or fill whole nodes: the most that do, for each batch."""
    job = plan.job
    if job.layout.grow_by != "ranks" or job.layout.ranks_per_phase:
        return plan
    parts = zip(plan.schedule.phases, plan.layouts, strict=True)
    ranks = [max(_fitting(plan, phase, layout.ranks, ranks_per_node)) for phase, layout in parts]
    layouts = [layout_for(phase, count, job) for phase, count in zip(plan.schedule.phases, ranks, strict=True)]
    return replace(plan, layouts=tuple(layouts))


def _fitting(plan: Plan, phase: Phase, most: int, ranks_per_node: int) -> list[int]:
    """Return the numbers of ranks that can form a phase's batch, and that fit on one node or fill whole nodes."""
    num_ghost_batches, uneven = phase.global_batch // plan.ghost_batch, plan.job.layout.uneven_ranks
    formable = formable_ranks(num_ghost_batches, most, uneven_ranks=uneven)
    return [ranks for ranks in formable if fills_nodes(ranks, ranks_per_node)]


def _node_fault(plan: Plan, phase: Phase, ranks: int, nodes_max: int, ranks_per_node: int) -> str | None:
    used = [layout.ranks for _, _, layout in plan.trained_phases]
    if not fills_nodes(ranks, ranks_per_node):
        fault = f"{ranks} ranks = {ranks / ranks_per_node:.2f} nodes of {ranks_per_node}"
        narrower = range(ranks_per_node - 1, 0, -1)
        others = (n for n in narrower if all(fills_nodes(count, n) and -(-count // n) <= nodes_max for count in used))
        remedies = [f"--ranks-per-node {n}" for n in others][:1]
    elif ranks > nodes_max * ranks_per_node:
        fault = f"{ranks} ranks = {ranks // ranks_per_node} nodes of {ranks_per_node}, and --nodes-max is {nodes_max}"
        fit = all(fills_nodes(count, ranks_per_node) for count in used)
        remedies = [f"--nodes-max {-(-max(used) // ranks_per_node)}"] if fit else []
    else:
        return None
    fitting = _fitting(plan, phase, nodes_max * ranks_per_node, ranks_per_node)
    near = [*[n for n in fitting if n < ranks][:1], *[n for n in fitting if n > ranks][-1:]]
    counts = f"{', '.join(map(str, near))} rank{'' if near == [1] else 's'} (layout.ranks_per_phase)"
    return f"{fault}; nearest: {', or '.join([counts, *remedies])}"


def _runs_of_phases(plan: Plan) -> Iterator[list[int]]:
    """Yield lists of consecutive phases with equal ranks; a phase without updates joins the phases before it."""
    run: list[int] = []
    for k, phase in enumerate(plan.schedule.phases):
        used = {plan.layouts[i].ranks for i in run if plan.schedule.phases[i].num_updates}
        if run and used and phase.num_updates and plan.layouts[k].ranks not in used:
            yield run
            run = []
        run.append(k)
    yield run


def _chain_job(plan: Plan, indices: Sequence[int], ranks_per_node: int) -> ChainJob:
    phases = [plan.schedule.phases[k] for k in indices]
    layouts: list[Layout] = [plan.layouts[k] for k, phase in zip(indices, phases, strict=True) if phase.num_updates]
    return ChainJob(
        first_phase=indices[0] + 1,
        last_phase=indices[-1] + 1,
        ranks=layouts[0].ranks,
        nodes=-(-layouts[0].ranks // ranks_per_node),
        start_samples=phases[0].start_samples,
        end_samples=phases[-1].end_samples,
        num_updates=sum(phase.num_updates for phase in phases),
    )


def with_ranks_per_phase(plan: Plan) -> Job:
    """Return the job with explicit ranks for each phase, so that every chain job compiles the same plan."""
    ranks = tuple(layout.ranks for layout in plan.layouts)
    return plan.job.model_copy(update={"layout": plan.job.layout.grown_by("ranks", ranks_per_phase=ranks)})
