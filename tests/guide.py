"""docs/guide.md as a program: the files that it lists, its commands, and what it says that they print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "guide.md"
CLUSTER = "On a cluster"
"""The section whose commands need Slurm, but for those with --dry-run."""

MEASURED = re.compile(
    r"[+-]?\d[\d,]*\.\d+(?:e-\d+)?(?: s\b)?|\d[\d,]*(?: s\b| samples/s|%)|(?<=: job )\d+|(?<=^verdict: ).*"
)
"""What differs between machines: decimal numbers, times, speeds, ids of jobs, and what two pairs of runs show."""


@dataclass(frozen=True)
class Block:
    """A block of commands, and the block of output below it.

    Attributes:
        section: title of the section, without its number.
        script: the commands.
        shown: their output as the page shows it; "" if it shows nothing.
    """

    section: str
    script: str
    shown: str

    @property
    def commands(self) -> list[str]:
        """The commands, one per line."""
        return self.script.replace("\\\n", " ").splitlines()

    @property
    def needs_slurm(self) -> bool:
        """Whether Slurm must be there."""
        return self.section == CLUSTER and not all("--dry-run" in command for command in self.commands)

    @property
    def is_measured(self) -> bool:
        """Whether the output has numbers that differ between machines."""
        return not all(re.search(r" plan (?!.*--cost)| --dry-run", command) for command in self.commands)

    def first_missing(self, output: str) -> str | None:
        """Return the first line of the page that an output does not have after the previous one. None: it has all."""
        lines = iter([_squeezed(line) for line in output.splitlines()])
        for line in self.shown.splitlines():
            pattern = _pattern(line, self.is_measured)
            if line.strip(" …") and not any(re.fullmatch(pattern, printed) for printed in lines):
                return line
        return None


def _pattern(line: str, is_measured: bool) -> str:
    """Return a regular expression for a line of output, in which … stands for any text."""
    shortened = MEASURED.sub("…", line) if is_measured else line
    return re.escape(_squeezed(shortened)).replace("…", ".*")


def _squeezed(line: str) -> str:
    """Return a line with one space or dash for several: the widths of a table's columns follow its figures."""
    return re.sub("─+", "─", " ".join(line.split()))


def files() -> dict[str, str]:
    """Return the texts of the files by their names, with which their first lines begin."""
    found = re.findall(
        r'^```(?:python|toml)\n((?:"""|# )([\w.]+): .*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    return {name: text for text, name in found}


def write_files(folder: Path) -> None:
    """Write the files of the page into a folder."""
    for name, text in files().items():
        (folder / name).write_text(text)


def blocks() -> list[Block]:
    """Return the blocks of commands."""
    found: list[Block] = []
    for part in re.split(r"^## (?:\d+\. )?", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        section, _, text = part.partition("\n")
        pairs = re.findall(r"^```sh\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", text, re.DOTALL | re.MULTILINE)
        found += [Block(section, script, shown) for script, shown in pairs]
    return found
