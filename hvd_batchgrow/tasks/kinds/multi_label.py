"""`task.name = "multi_label"`."""

from __future__ import annotations

from hvd_batchgrow.config.task_specs import TASKS, TaskSpec

TASKS.register(
    TaskSpec(
        name="multi_label",
        doc="K labels per sample, each 0 or 1: binary cross-entropy, averaged over the labels; `f1` of all labels "
        "together (micro-averaged), and `label_accuracy`, the fraction of labels predicted correctly",
        target="values",
        metrics={"f1": "up", "label_accuracy": "up"},
        keys=frozenset({"pos_weights"}),
        module="hvd_batchgrow.tasks.multi_label",
        output_shape=lambda shape, num_outputs: (num_outputs,),
        answer="labels",
    )
)
