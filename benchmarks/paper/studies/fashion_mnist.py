"""The papers' claims on Fashion-MNIST, with the quickstart's network and schedule: docs/results.md."""

from __future__ import annotations

from functools import partial

from benchmarks.paper.studies.study import QUIET, Arm, Study, Table, keys

PAGE = "results.md"
MARGIN = 0.3
FIVE = (5, 6, 7, 8, 9)

DECAY, HYBRID, GROW, LATE = (f"jobs/fashion_mnist_{name}.toml" for name in ("decay", "hybrid", "grow", "late"))
BRANCH = "jobs/fashion_mnist_branch.toml"
GROW_LR, GROW_MOMENTUM = "jobs/fashion_mnist_grow_lr.toml", "jobs/fashion_mnist_grow_momentum.toml"
ADABATCH, ADAM, RESNET = (
    f"benchmarks/paper/jobs/fashion_mnist_{name}.toml" for name in ("adabatch", "adam", "resnet8")
)
LATER_MOMENTUM = keys(schedule__momenta="[0.9, 0.98, 0.98, 0.98]")
"""The momentum is raised at the first boundary, when its buffer is full: only then can it be rescaled."""
FIXED = keys(schedule__batch_factor="1", schedule__lr_factor="0.375")
"""AdaBatch's comparison: the learning rate alone decays."""
LARGE = keys(schedule__global_batch="4096", schedule__warmup_epochs="2", optim__lr="3.2")
"""The last batch of AdaBatch from the start, with the learning rate multiplied by as much (Goyal et al. 2017)."""


def ghost_batch(ghost: int) -> dict[str, str]:
    """Return the changes for micro-batches of one ghost batch."""
    return keys(model__ghost_batch=str(ghost), layout__max_micro_batch=str(ghost))


def _policies(prefix: str, **changes: str) -> tuple[Arm, ...]:
    """Return decay, hybrid and growth with a variant of SGD."""
    jobs = (("decay", DECAY), ("hybrid", HYBRID), ("grow", GROW))
    return tuple(Arm(f"{prefix}_{policy}", job, keys(**changes)) for policy, job in jobs)


ABLATION = Study(
    "ablation",
    (
        Arm("decay", DECAY),
        Arm("grow", GROW),
        *(Arm(f"max_batch_{batch}", GROW, keys(schedule__max_batch=str(batch))) for batch in (640, 1280, 2560)),
        Arm("late", LATE),
        Arm("late_1280", LATE, keys(schedule__max_batch="1280")),
        Arm("precise_bn", GROW, keys(model__precise_bn_samples="12800"), has_twin=True),
        Arm("no_momentum", GROW, keys(optim__momentum="0", optim__lr="1.0"), has_twin=True),
        Arm("ghost_32", GROW, ghost_batch(32), has_twin=True),
        Arm("ghost_128", GROW, ghost_batch(128), has_twin=True),
    ),
    seeds=(0, 1, 2, 3, 4),
    changes=QUIET | keys(data__validation_fraction="0.1"),
)
"""Why growth ends below its twin. Choices are made on the validation set of these seeds."""

ADAMW = keys(optim__name="adamw", optim__weight_decay="0.05")
SEESAW = keys(schedule__policy="seesaw")
PER_EPOCH = keys(optim__weight_decay_rule="per_epoch")
WEIGHT_DECAY = ("adamw-twin", "adamw", "adamw_per_epoch", "adamw_seesaw", "adamw_seesaw_per_epoch")

CLAIMS = Study(
    "fashion_mnist",
    (
        Arm("decay", DECAY, seeds=FIVE),
        Arm("hybrid", HYBRID, seeds=FIVE),
        Arm("grow", GROW, seeds=FIVE),
        Arm("max_batch_2560", GROW, keys(schedule__max_batch="2560"), seeds=FIVE),
        Arm("late", LATE, has_twin=True, seeds=FIVE),
        Arm("branch", BRANCH),
        Arm("adabatch_small", ADABATCH, FIXED, seeds=FIVE),
        Arm("adabatch_large", ADABATCH, FIXED | LARGE, seeds=FIVE),
        Arm("adabatch_grow", ADABATCH, seeds=FIVE),
        Arm("grow_lr", GROW_LR),
        Arm("grow_momentum", GROW_MOMENTUM),
        Arm("grow_momentum_1280", GROW_MOMENTUM, keys(schedule__max_batch="1280")),
        Arm("momentum_later", GROW, LATER_MOMENTUM),
        Arm("momentum_later_rescaled", GROW, LATER_MOMENTUM | keys(optim__rescale_momentum="true")),
        *_policies("nesterov", optim__nesterov="true"),
        *_policies("no_momentum", optim__momentum="0", optim__lr="1.0"),
        Arm("adam", ADAM, has_twin=True),
        Arm("adam_hybrid", ADAM, keys(schedule__policy="hybrid", schedule__growing_boundaries="1")),
        Arm("adam_seesaw", ADAM, SEESAW),
        Arm("adamw", ADAM, ADAMW, has_twin=True),
        Arm("adamw_per_epoch", ADAM, ADAMW | PER_EPOCH),
        Arm("adamw_seesaw", ADAM, ADAMW | SEESAW),
        Arm("adamw_seesaw_per_epoch", ADAM, ADAMW | SEESAW | PER_EPOCH),
        Arm("hadamard", GROW, keys(model__classifier="hadamard"), has_twin=True),
        Arm("resnet8", RESNET),
        Arm("resnet8_shakedrop", RESNET, keys(model__shakedrop="0.5")),
        Arm("resnet8_shakedrop_0.1", RESNET, keys(model__shakedrop="0.1")),
    ),
    seeds=FIVE[:3],
    changes=QUIET,
)

RAISED = ("grow", "grow_lr", "grow_momentum", "grow_momentum_1280", "momentum_later", "momentum_later_rescaled")

_table = partial(Table, study=CLAIMS, page=PAGE, margin=MARGIN)

TABLES = (
    Table("ablation", ABLATION, PAGE, dataset="validation", margin=MARGIN, with_twins=True),
    Table("ablation_test", ABLATION, PAGE, margin=MARGIN, with_twins=True),
    _table(
        "momentum",
        names=("decay", "hybrid", "grow", "max_batch_2560", "late-twin", "late", "branch"),
        with_twins=True,
        with_figures=True,
    ),
    _table("nesterov", names=("nesterov_decay", "nesterov_hybrid", "nesterov_grow"), with_figures=True),
    _table("no_momentum", names=("no_momentum_decay", "no_momentum_hybrid", "no_momentum_grow"), with_figures=True),
    _table("adam", names=("adam-twin", "adam_hybrid", "adam", "adam_seesaw"), with_figures=True),
    _table("raised", names=RAISED, with_figures=True),
    _table("adabatch", names=("adabatch_small", "adabatch_grow", "adabatch_large"), with_figures=True),
    _table("weight_decay", names=WEIGHT_DECAY),
    _table("modules", names=("grow", "hadamard"), with_twins=True),
    _table("shakedrop", names=("resnet8", "resnet8_shakedrop_0.1", "resnet8_shakedrop")),
)
