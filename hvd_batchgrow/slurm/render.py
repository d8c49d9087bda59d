"""The text of a link's batch script, from a template that users edit."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvd_batchgrow.messages.errors import Fault, JobError

_DECIDED = {
    "job-name": "--name",
    "nodes": "--nodes-max, and the plan says how many of them a link takes",
    "ntasks": "--nodes-max and --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "output": "--runs-dir, the logs lie in NAME/slurm there",
    "error": "--runs-dir, the logs lie in NAME/slurm there with all that is said",
    "signal": "--signal-delay-s",
    "test-only": "--dry-run prints all, and what is submitted is tested first",
    "no-requeue": "MAX_RESTARTS=0 before submit leaves a link that is stopped alone",
    "chdir": "--runs-dir; a link starts where submit does",
    "dependency": "each link waits for the one before it; nearest: --sbatch begin=TIME",
    "kill-on-invalid-dep": "a link that can never start is cancelled",
    "array": "each link is one job",
    "wrap": "--template",
    "parsable": "the ledger has the numbers of the jobs",
    "wait": "hvd-batchgrow status tells whether it is over",
}
"""Options of sbatch that `submit` decides: and what decides them."""

_HERE = Path(__file__).resolve()
_IN_WHEEL = _HERE.with_name("templates")
TEMPLATES = _IN_WHEEL if _IN_WHEEL.is_dir() else _HERE.parents[2] / "slurm"
"""Folder of the batch scripts that come with the package: `setup.py` copies `slurm/` of the sources into a wheel."""

ARGUMENTS = 'arguments=("$@")'
"""The line of a template that a link's arguments take the place of."""
PROGRAM = "program=(hvd-batchgrow)"
"""Likewise of the program; a template in which it was edited keeps its own."""


def render(template: str, options: Mapping[str, str], program: Sequence[str], arguments: Sequence[str]) -> str:
    """A batch script.

    Whatever options, program and arguments hold, it stays text: bash gets it in single quotes, sbatch in double ones.

    Args:
        template: a batch script with the line `arguments=("$@")`.
        options: of sbatch, by their long names; "" for one without a value. They take the place of the template's.
        program: what runs hvd-batchgrow.
        arguments: of `hvd-batchgrow train`.

    Raises:
        JobError: the template lacks that line, or a value cannot be written into one line.
    """
    lines = template.splitlines()
    if lines.count(ARGUMENTS) != 1 or not template.startswith("#!"):
        fault = f"must start with #! and have this line once: {ARGUMENTS}"
        raise JobError([Fault("", fault)], "template")
    mine = [directive(key, value) for key, value in options.items()]
    first_command = next(k for k, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    kept = [line for line in lines[:first_command] if _key_of(line) not in options]
    end = max((k for k, line in enumerate(kept) if line.startswith("#SBATCH")), default=0) + 1
    words = {PROGRAM: f"program=({shlex.join(program)})", ARGUMENTS: f"arguments=({shlex.join(arguments)})"}
    body = [words.get(line, line) for line in lines[first_command:]]
    return "\n".join([*kept[:end], *mine, *kept[end:], *body]) + "\n"


def _key_of(line: str) -> str | None:
    found = re.match(r"#SBATCH\s+--([a-z-]+)", line)
    return found[1] if found else None


def directive(key: str, value: str) -> str:
    """One `#SBATCH` line; what sbatch's reader would take for more than text is quoted.

    Raises:
        JobError: the value has characters that no line can hold.
    """
    if not value.isprintable():
        raise JobError([Fault(f"--{key}", f"a line of a batch script cannot hold {value!r}")], "sbatch")
    if not value:
        return f"#SBATCH --{key}"
    if re.fullmatch(r"[\w.,:=+@%/\[\]()*-]+", value):
        return f"#SBATCH --{key}={value}"
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'#SBATCH --{key}="{escaped}"'


def extra_options(words: Sequence[str]) -> dict[str, str]:
    """Options of sbatch given as KEY=VALUE, or KEY for one without a value.

    Raises:
        JobError: one is no option, or is one that a chain decides itself.
    """
    options, faults = {}, []
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            faults.append(Fault("--sbatch", f"must be KEY=VALUE with a long name of sbatch's, got {word!r}"))
        elif key in _DECIDED:
            faults.append(Fault("--sbatch", f"{key} is decided by the chain: {_DECIDED[key]}"))
        options[key] = value
    if faults:
        raise JobError(faults, "command line")
    return options


def log_pattern(folder: Path) -> str:
    """Where Slurm writes what a link says, as sbatch's --output takes it: `%` stands for itself.

    Raises:
        JobError: Slurm cannot name a file there.
    """
    if "\\" in str(folder) or not str(folder).isprintable():
        fault = f"{str(folder)!r}: Slurm's names of logs know no backslash and no line break; choose another folder"
        raise JobError([Fault("--runs-dir", fault)], "command line")
    return f"{str(folder).replace('%', '%%')}/%x-%j.out"


def test_words(script: Path) -> list[str]:
    """The command that asks whether a link could ever run."""
    return ["sbatch", "--test-only", str(script)]


def submit_words(script: Path, after: int | None) -> list[str]:
    """The command that submits a link, after another where there is one."""
    waits = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", *waits, str(script)]


def dry_commands(scripts: Sequence[Path]) -> list[str]:
    """What `submit` would do, as lines for a shell."""
    lines = [shlex.join(test_words(script)) for script in scripts]
    for k, script in enumerate(scripts):
        # Digits that no job has yet are replaced by the shell's variable.
        words = shlex.join(submit_words(script, 0 if k else None))
        words = words.replace("--dependency=afterok:0", f'--dependency=afterok:"$link_{k}"', 1)
        lines.append(f"link_{k + 1}=$({words})")
    return lines
