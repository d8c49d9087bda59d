"""`hvd-batchgrow export`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hvd_batchgrow.cli.common import refuse_overrides
from hvd_batchgrow.cli.predict import WeightsCommand
from hvd_batchgrow.messages.errors import ExitCode


@dataclass(frozen=True, kw_only=True)
class ExportCommand(WeightsCommand):
    """Write the weights of a run for use without this package, and a card with preprocessing and classes."""

    to: Literal["safetensors", "onnx", "torchscript", "exported_program", "state_dict"]
    """state_dict and safetensors: weights with their names. torchscript (torch.jit.trace), exported_program
    (torch.export) and onnx: the network too, for batches of any size."""
    output: Path
    """The file to write."""
    average: bool = False
    """Export the moving average of the weights (update.ema_samples)."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Write both files, and print their paths."""
        from hvd_batchgrow.deployment.export import export
        from hvd_batchgrow.deployment.trained_network import load_network

        refuse_overrides(overrides)
        network = load_network(self.folder, self.checkpoint, "cpu", average=self.average)
        card, notes = export(network, self.to, self.output)
        for note in (*network.notes, *notes):
            print(note, file=sys.stderr)
        print(f"{self.output}\n{card}")
        return ExitCode.DONE
