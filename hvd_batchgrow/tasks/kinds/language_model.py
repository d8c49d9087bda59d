"""`task.name = "language_model"`."""

from __future__ import annotations

from hvd_batchgrow.config.task_specs import TASKS, TaskSpec

TASKS.register(
    TaskSpec(
        name="language_model",
        doc="the next token at each position: cross-entropy, averaged over the tokens of an update; `bits_per_token`, "
        "and `top1`, the fraction of tokens predicted correctly",
        target="tokens",
        metrics={"bits_per_token": "down", "top1": "up"},
        keys=frozenset({"label_smoothing"}),
        module="hvd_batchgrow.tasks.language_model",
        output_shape=lambda shape, num_outputs: (*shape, num_outputs),
    )
)
