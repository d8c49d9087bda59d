"""Render the batch script of a job from a template that users can edit."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hvd_batchgrow.messages.errors import Fault, JobError

_DECIDED = {
    "job-name": "--name",
    "nodes": "--nodes-max, and the plan determines how many of them a chain job uses",
    "ntasks": "--nodes-max and --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "output": "--runs-dir, the logs are in its NAME/slurm",
    "error": "--runs-dir, the logs in its NAME/slurm contain stderr too",
    "signal": "--signal-delay-s",
    "test-only": "--dry-run prints all commands, and submit tests each script first",
    "no-requeue": "MAX_RESTARTS=0 in the environment of submit disables requeueing",
    "chdir": "--runs-dir; a chain job starts in the folder of submit",
    "dependency": "each chain job waits for the one before it; nearest: --sbatch begin=TIME",
    "kill-on-invalid-dep": "a chain job that can never start is cancelled",
    "array": "a job of a chain is a single job, and --branch makes an array with a task for each branch",
    "wrap": "--template",
    "parsable": "the ledger has the job ids",
    "wait": "hvd-batchgrow status shows whether the chain has ended",
}
"""Options of sbatch that `submit` sets, and what determines their values."""

_VARIABLES = {"array": "ARRAY_INX", "mem": "MEM_PER_NODE", "switches": "REQ_SWITCH", "time": "TIMELIMIT"}
"""Variables of sbatch, without SBATCH_, whose names are not those of their options."""

_HERE = Path(__file__).resolve()
_IN_WHEEL = _HERE.with_name("templates")
TEMPLATES = _IN_WHEEL if _IN_WHEEL.is_dir() else _HERE.parents[2] / "slurm"
"""Folder of the batch scripts of the package: `setup.py` copies `slurm/` of the sources into a wheel."""

ARGUMENTS = 'arguments=("$@")'
"""The line of a template that is replaced by the arguments of a job."""
COMMAND = "command=train"
"""The line of a template that is replaced if the job runs another command than `train`."""
PROGRAM = "program=(hvd-batchgrow)"
"""The line of a template that is replaced by the program; an edited line stays as it is."""


def render(
    template: str,
    options: Mapping[str, str],
    program: Sequence[str],
    arguments: Sequence[str],
    command: str = "train",
    variable: str = "",
) -> str:
    """Return a batch script.

    Options, program and arguments are always literal text: quoted with single quotes for bash, double ones for sbatch.

    Args:
        template: a batch script with the line `arguments=("$@")`.
        options: options of sbatch by their long names; "" for one without a value. They override the template's.
        program: the command of hvd-batchgrow.
        arguments: of the command.
        command: of hvd-batchgrow.
        variable: name of an environment variable of the job whose value is the last argument; "": no further argument.

    Raises:
        JobError: the template lacks that line, or `command=train` for another command, or a value does not fit on one
            line.
    """
    lines = template.splitlines()
    if lines.count(ARGUMENTS) != 1 or not template.startswith("#!"):
        fault = f"must start with #! and have this line once: {ARGUMENTS}"
        raise JobError([Fault("", fault)], "template")
    if command != "train" and lines.count(COMMAND) != 1:
        fault = f'must have this line once, and run "${{program[@]}}" "$command" "${{arguments[@]}}": {COMMAND}'
        raise JobError([Fault("", fault)], "template")
    mine = [directive(key, value) for key, value in options.items()]
    first_command = next(k for k, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    # sbatch takes the last of several values, so a line with further options can stay.
    kept = [line for line in lines[:first_command] if _sole_option(line) not in options]
    end = max((k for k, line in enumerate(kept) if line.startswith("#SBATCH")), default=0) + 1
    last = [f'"${variable}"'] if variable else []
    words = {
        PROGRAM: f"program=({shlex.join(program)})",
        COMMAND: f"command={command}",
        ARGUMENTS: f"arguments=({' '.join([*map(shlex.quote, arguments), *last])})",
    }
    body = [words.get(line, line) for line in lines[first_command:]]
    return "\n".join([*kept[:end], *mine, *kept[end:], *body]) + "\n"


def _sole_option(line: str) -> str | None:
    """Return the option of an `#SBATCH` line; None if the line has several, or a short one."""
    found = re.fullmatch(r"#SBATCH\s+--([a-z-]+)(?:(?:=|\s+)[^-\s]\S*)?\s*(?:#.*)?", line)
    return found[1] if found else None


def overriding_variables(given: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """Return the variables in an environment that override what `submit` decides.

    sbatch prefers its variables, such as SBATCH_PARTITION, to the lines of a script.

    Args:
        given: options of sbatch that `submit` was given, by their long names. Variables for other options may stay.
        environment: of `submit`.
    """
    names = (_VARIABLES.get(key) or key.upper().replace("-", "_") for key in (*_DECIDED, *given))
    return sorted({f"SBATCH_{name}" for name in names} & environment.keys())


def directive(key: str, value: str) -> str:
    """Return an `#SBATCH` line; the value is quoted if sbatch would interpret its characters.

    Raises:
        JobError: the value contains characters that are not printable.
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
    """Return options of sbatch given as KEY=VALUE, or as KEY for one without a value.

    Raises:
        JobError: a word is not an option, or is one that `submit` sets.
    """
    options: dict[str, str] = {}
    faults = []
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            faults.append(Fault("--sbatch", f"must be KEY=VALUE with a long option name of sbatch, got {word!r}"))
        elif key in _DECIDED:
            faults.append(Fault("--sbatch", f"{key} is set by submit: {_DECIDED[key]}"))
        elif key in options:
            faults.append(Fault("--sbatch", f"{key} is given twice: {options[key]!r} and {value!r}"))
        options[key] = value
    if faults:
        raise JobError(faults, "command line")
    return options


def log_pattern(folder: Path, name: str = "%x-%j") -> str:
    """Return the log file of a job for sbatch's --output, with each `%` of the folder escaped.

    Raises:
        JobError: Slurm cannot write a file with this path.
    """
    if "\\" in str(folder) or not str(folder).isprintable():
        fault = f"{str(folder)!r}: Slurm's log names cannot contain a backslash or a line break; choose another folder"
        raise JobError([Fault("--runs-dir", fault)], "command line")
    return f"{str(folder).replace('%', '%%')}/{name}.out"


def test_words(script: Path) -> list[str]:
    """Return the command that tests whether a job could run."""
    return ["sbatch", "--test-only", str(script)]


def submit_words(script: Path, after: int | None) -> list[str]:
    """Return the command that submits a chain job, to start after another job if `after` is given."""
    waits = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", *waits, str(script)]


def submit_after_any_words(script: Path, after: Sequence[int]) -> list[str]:
    """Return the command that submits a job to start after other jobs have ended, whatever their results."""
    return ["sbatch", "--parsable", f"--dependency=afterany:{':'.join(map(str, after))}", str(script)]


def unset_line(variables: Sequence[str]) -> list[str]:
    """Return a shell line that removes variables; nothing without variables."""
    return [f"unset {' '.join(variables)}"] if variables else []


def dry_commands(scripts: Sequence[Path], without: Sequence[str]) -> list[str]:
    """Return the commands of `submit` as shell lines, which first remove the variables `without`."""
    lines = [*unset_line(without), *(shlex.join(test_words(script)) for script in scripts)]
    for k, script in enumerate(scripts):
        # 0 is a placeholder for the job id in the shell's variable.
        words = shlex.join(submit_words(script, 0 if k else None))
        words = words.replace("--dependency=afterok:0", f'--dependency=afterok:"$job_{k}"', 1)
        lines.append(f"job_{k + 1}=$({words})")
    return lines
