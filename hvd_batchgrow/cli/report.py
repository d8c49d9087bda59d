"""`hvd-batchgrow report`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from hvd_batchgrow import __version__
from hvd_batchgrow.cli.common import refuse_overrides
from hvd_batchgrow.config.types import Margin, Price
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError
from hvd_batchgrow.messages.wording import counted


@dataclass(frozen=True)
class ReportCommand:
    """Write a report of runs as one HTML file that loads nothing, or as Markdown, CSV and pictures."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders of run folders. The job of the first run is compared with the others."""
    out: Path | None = None
    """Write the report to this HTML file; by default report.html, unless --dir is given."""
    dir: Path | None = None
    """Write report.md, CSV files, and the figures as PNG and SVG into this folder; it is created if necessary."""
    margin: Margin | None = None
    """Largest difference that does not matter, in percentage points for accuracy, otherwise in units of the metric."""
    price: Price | None = None
    """Price of a rank-hour: adds the cost of the updates of each run."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Write the files; print their names to stdout."""
        from hvd_batchgrow.reports.build import build_document
        from hvd_batchgrow.reports.write import write_folder, write_html
        from hvd_batchgrow.storage.atomic import is_stream

        refuse_overrides(overrides)
        if not self.runs:
            fault = "name at least one run folder, or a folder of runs such as runs"
            raise JobError([Fault("RUN", fault)], "command line")
        document = build_document(
            self.runs,
            margin=self.margin,
            price=self.price,
            command=self._words(),
            made=f"Made by hvd-batchgrow {__version__} on {time.strftime('%Y-%m-%d at %H:%M %z')}",
        )
        out = self.out or (None if self.dir else Path("report.html"))
        if out:
            size = write_html(document, out)
            if not is_stream(out):
                print(f"{out}: {size / 1e6:.2f} MB")
        if self.dir:
            print(f"{self.dir}: {counted(write_folder(document, self.dir), 'file')}")
        return ExitCode.DONE

    def _words(self) -> list[str]:
        options = {"--out": self.out, "--dir": self.dir, "--margin": self.margin, "--price": self.price}
        given = [f"{flag}={value}" for flag, value in options.items() if value is not None]
        return ["hvd-batchgrow", "report", *map(str, self.runs), *given]
