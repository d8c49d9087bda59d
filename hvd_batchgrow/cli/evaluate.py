"""`hvd-batchgrow evaluate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.cli.common import terminal
from hvd_batchgrow.cli.predict import InferenceCommand
from hvd_batchgrow.messages.errors import ExitCode
from hvd_batchgrow.messages.wording import metric_texts


@dataclass(frozen=True)
class EvaluateCommand(InferenceCommand):
    """Print loss and metrics of a run's weights on its test set, or on other data: --data.root, --data.test."""

    json: bool = False
    """Print one JSON object."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout."""
        from hvd_batchgrow.deployment.evaluation import evaluate_run
        from hvd_batchgrow.observers.progress import work_progress
        from hvd_batchgrow.storage.strict_json import dump_json

        with work_progress(terminal(sys.stderr)) as report:
            result = evaluate_run(self.folder, self.checkpoint, self.device, overrides, report)
        for note in result.notes:
            print(note, file=sys.stderr)
        if self.json:
            print(dump_json(result.to_dict(), indent=2))
            return ExitCode.DONE
        found = result.found
        print(f"{self.folder} at sample {found.samples:,}, {result.num_test:,} test samples")
        print(", ".join(f"test {text}" for text in [f"loss {found.loss:.4f}", *metric_texts(found.metrics)]))
        if found.average_loss is not None:
            texts = [f"loss {found.average_loss:.4f}", *metric_texts(found.average_metrics)]
            print(f"averaged weights: {', '.join(f'test {text}' for text in texts)}")
        return ExitCode.DONE
