"""`hvd-batchgrow completion`: a shell script that completes commands, options and keys of a job file."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, make_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro

from hvd_batchgrow.cli.common import JobCommand, refuse_overrides
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import job_keys, variants
from hvd_batchgrow.messages.errors import ExitCode

_FILES = 'if [[ "$completions" == "__TYRO_COMPLETE_FILES__" ]]'
_FILES_OR_NOTHING = 'if [[ -z "$completions" || "$completions" == "__TYRO_COMPLETE_FILES__" ]]'
_SOURCED = """
if [[ "$funcstack[1]" == "_hvd-batchgrow" ]]; then
  _tyro_hvd_batchgrow "$@"
else
  compdef _tyro_hvd_batchgrow hvd-batchgrow
fi
"""
_CHANGES = {
    # Without a match, the shell completes the names of files.
    "bash": {
        _FILES: _FILES_OR_NOTHING,
        'COMPREPLY=($(compgen -f -- "$cur"))': "COMPREPLY=()",
        "\ncomplete -F ": "\ncomplete -o bashdefault -o default -F ",
    },
    "zsh": {
        _FILES: _FILES_OR_NOTHING,
        '\n_tyro_hvd_batchgrow "$@"\n': _SOURCED,  # the script can be sourced, or be a file in fpath
    },
}
"""Changes to tyro's scripts."""


@dataclass(frozen=True)
class CompletionCommand:
    """Print the completion script of a shell: eval "$(hvd-batchgrow completion bash)"."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """Shell for which to print the script."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout."""
        from hvd_batchgrow.cli.commands import PARSER, commands_by_name

        refuse_overrides(overrides)
        print(completion_script(self.shell, commands_by_name(), PARSER), end="")
        return ExitCode.DONE


def completion_script(shell: str, commands: dict[str, type], parser: dict[str, Any]) -> str:
    """Return the script that tyro generates. It contains all names, so that pressing TAB does not import the package.

    Args:
        shell: bash or zsh.
        commands: the classes of the commands by name.
        parser: the arguments of `tyro.cli` that do not depend on the command line.
    """
    kinds = [Annotated[with_job_keys(kind), tyro.conf.subcommand(name)] for name, kind in commands.items()]
    any_command: Any = Union[tuple(kinds)]  # noqa: UP007  # the kinds are not known to a type checker
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        tyro.cli(any_command, args=["--tyro-write-completion", shell, "-"], **parser)
    script = text.getvalue()
    for old, new in _CHANGES[shell].items():
        script = script.replace(old, new)
    # A shell would read a line break within a description as another completion.
    return re.sub("^COMPLETION_SPEC = .*", lambda spec: spec[0].replace("\\n", " "), script, flags=re.MULTILINE)


def with_job_keys(command: type) -> type:
    """Return the command with an option for each key of a job file, if it reads one."""
    if not issubclass(command, JobCommand):
        return command
    options = [
        (key.replace(".", "__"), Annotated[values_of(key), tyro.conf.arg(name=key, help="key of the job file")], None)
        for key in job_keys()
    ]
    return make_dataclass(
        command.__name__, options, bases=(command,), frozen=True, namespace={"__doc__": command.__doc__}
    )


def values_of(key: str) -> Any:
    """Return the type of the option for a key: a Literal of its allowed words, or else any text."""
    section, _, name = key.partition(".")
    models = variants(section).values() if section in Job.model_fields else ()
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    names = dict.fromkeys(text for field in fields for text in _names(field.annotation))
    return Literal[(*names,)] | None if names else str | None


def _names(annotation: Any) -> Iterator[str]:
    """Yield the words that this type allows as values."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from (value for value in get_args(annotation) if isinstance(value, str))
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for part in get_args(annotation):
            yield from _names(part)
