"""The descriptions of options that `--help` prints."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, is_dataclass
from itertools import pairwise
from types import MappingProxyType


def join_descriptions(command: type) -> type:
    """Give tyro the description of each option in one line: it would keep the line breaks of the docstring."""
    for base in filter(is_dataclass, command.__mro__):
        options = {option.name: option for option in fields(base)}
        (node,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(node, ast.ClassDef)
        for option, text in pairwise(node.body):
            match option, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(description))):
                    options[name].metadata = MappingProxyType({"help": " ".join(description.split())})
    return command
