"""`task.name = "regression"`."""

from __future__ import annotations

from hvd_batchgrow.config.task_specs import TASKS, TaskSpec

TASKS.register(
    TaskSpec(
        name="regression",
        doc="K numbers per sample: `task.loss`, averaged over the targets; `mae` and `mse`, the mean absolute and "
        "squared error in the units of the targets",
        target="values",
        metrics={"mae": "down", "mse": "down"},
        keys=frozenset({"loss", "huber_delta", "standardize"}),
        module="hvd_batchgrow.tasks.regression",
        output_shape=lambda shape, num_outputs: (num_outputs,),
        answer="values",
    )
)
