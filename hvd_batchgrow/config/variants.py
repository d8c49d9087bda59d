"""Registries of the sections between which a key chooses, such as `policy = "grow"`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from hvd_batchgrow.config.registry import Registry
from hvd_batchgrow.config.types import Section

AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Variant:
    """A section, and the value of the key that selects it."""

    name: str
    section: type[Any]


class Variants(Registry[Variant]):
    """Sections by the value of a key, each with a single value.

    Args:
        package: the package whose modules have the sections.
        key: the key.
    """

    def __init__(self, package: str, key: str) -> None:
        super().__init__(package)
        self._key = key

    def add(self, section: type[AnySection]) -> type[AnySection]:
        """Decorate a section to register it."""
        (name,) = get_args(section.model_fields[self._key].annotation)
        self.register(Variant(str(name), section))
        return section

    def sections(self) -> list[type[Any]]:
        """Return all sections, sorted by the value of the key."""
        return [variant.section for variant in self.specs()]
