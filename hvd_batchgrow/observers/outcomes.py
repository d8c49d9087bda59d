"""outcomes.npz: what each test sample came to at the end of a run."""

from __future__ import annotations

from hvd_batchgrow.results.outcomes import write_outcomes
from hvd_batchgrow.train.events import Evaluation, Observer, RunStarted


class OutcomesFile(Observer):
    """Writes `outcomes.npz`."""

    def on_start(self, event: RunStarted) -> None:
        """Remember the run folder."""
        self._folder = event.folder

    def on_evaluation(self, event: Evaluation) -> None:
        """Write the outcomes of an evaluation that has them."""
        if event.outcomes is not None:
            write_outcomes(self._folder, event.outcomes)
