"""Registries of sources, policies, triggers and models, each of which registers itself from its own file."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    """What every spec has."""

    @property
    def name(self) -> str:
        """The name in a job file."""


Spec = TypeVar("Spec", bound=Named)


class Registry(Generic[Spec]):
    """Specs by name, in the order of their names.

    The first lookup imports every module of the package, so that a new file is found without another edit. Such a
    module must be quick to import: it imports torch, pandas or a decoder only when a job uses it.

    Args:
        package: the package whose modules call `register`.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._specs: dict[str, Spec] = {}
        self._is_scanned = False

    def register(self, spec: Spec) -> Spec:
        """Add a spec and return it. Raises ValueError if its name is taken."""
        if spec.name in self._specs:
            raise ValueError(f"{spec.name!r} is registered twice in {self._package}")
        self._specs[spec.name] = spec
        return spec

    def get(self, name: str) -> Spec | None:
        """Return the spec of a name, or None."""
        return self._all().get(name)

    def __getitem__(self, name: str) -> Spec:
        return self._all()[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._all())

    def specs(self) -> list[Spec]:
        """Return all specs, sorted by name."""
        return [self._specs[name] for name in self.names()]

    def _all(self) -> dict[str, Spec]:
        if not self._is_scanned:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._is_scanned = True
        return self._specs
