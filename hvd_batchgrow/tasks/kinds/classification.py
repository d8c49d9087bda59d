"""`task.name = "classification"`."""

from __future__ import annotations

from hvd_batchgrow.config.task_specs import TASKS, TaskSpec

TASKS.register(
    TaskSpec(
        name="classification",
        doc="one class per sample: cross-entropy; `top1`, the fraction of samples classified correctly",
        target="class",
        metrics={"top1": "up"},
        keys=frozenset({"label_smoothing", "class_weights"}),
        module="hvd_batchgrow.tasks.classification",
        output_shape=lambda shape, num_outputs: (num_outputs,),
        answer="class",
    )
)
