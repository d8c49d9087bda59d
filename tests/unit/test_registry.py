"""Tests of the registries of sources, policies, triggers and models."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvd_batchgrow.config.registry import Registry


@dataclass(frozen=True)
class Part:
    name: str


def test_a_new_file_in_the_package_is_found_without_another_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "parts_on_trial"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from hvd_batchgrow.config.registry import Registry\nPARTS = Registry('parts_on_trial')\n"
    )
    for file, name in (("first", "zebra"), ("second", "ant")):
        (package / f"{file}.py").write_text(
            f"from types import SimpleNamespace\nfrom parts_on_trial import PARTS\n"
            f"PARTS.register(SimpleNamespace(name={name!r}))\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    parts = __import__("parts_on_trial").PARTS
    assert "parts_on_trial.first" not in sys.modules  # imported by the first lookup
    assert parts.names() == ["ant", "zebra"]
    assert [part.name for part in parts.specs()] == ["ant", "zebra"]
    assert parts["ant"].name == "ant"
    assert parts.get("bee") is None


def test_two_specs_with_one_name_are_refused() -> None:
    parts = Registry[Part]("hvd_batchgrow.storage")
    parts.register(Part("twice"))
    with pytest.raises(ValueError, match=r"'twice' is registered twice in hvd_batchgrow\.storage"):
        parts.register(Part("twice"))
