"""sources: the types of source. A new one is one module and one line here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tasks.checkpoints import folder, hub
from tasks.checkpoints.hub_name import HubName
from tasks.checkpoints.source import Opening, ReadableSource
from tasks.core.spec import SourceSpec


class SourceType(Protocol):
    """What a source's module has.

    Attributes:
        PREFIX: what models.toml begins with where it names one.
    """

    PREFIX: str

    def locate(self, text: str, base: Path) -> str:
        """Return the location that a name means; ``base`` is the folder that it is relative to.

        Raises:
            Mistakes: it means nothing.
        """

    def spelled(self, location: str, base: Path) -> str:
        """Return how models.toml in ``base`` is to name a location; both without the prefix."""

    def folder(self, location: str) -> Path | None:
        """Return the folder of this machine that it is, there or not; None, it is none."""

    def on_hub(self, location: str) -> HubName | None:
        """Return what anybody can have it by, if its location tells."""

    def open_source(self, location: str, opening: Opening) -> ReadableSource:
        """Return the source, whether or not it is there."""


# A folder's path is what begins like no other.
SOURCES: dict[str, SourceType] = {module.PREFIX: module for module in (folder, hub)}


def spec(text: str, base: Path) -> SourceSpec:
    """Return the source that models.toml calls ``text``.

    Args:
        text: a folder's path, or what another type of source has behind its prefix.
        base: the folder that models.toml lies in.

    Raises:
        Mistakes: it is no such thing.
    """
    prefix = max((prefix for prefix in SOURCES if text.startswith(prefix)), key=len)
    return SourceSpec(prefix, SOURCES[prefix].locate(text.removeprefix(prefix), base))


def spelled(spec: SourceSpec, base: Path) -> str:
    """Return how models.toml in ``base`` is to name a source."""
    return spec.prefix + SOURCES[spec.prefix].spelled(spec.location, base)


def folder_of(spec: SourceSpec) -> Path | None:
    """Return the folder of this machine that a source is, there or not; None, it is none."""
    return SOURCES[spec.prefix].folder(spec.location)


def on_hub(spec: SourceSpec) -> HubName | None:
    """Return what anybody can have a source by, if its location tells."""
    return SOURCES[spec.prefix].on_hub(spec.location)


def open_source(spec: SourceSpec, opening: Opening) -> ReadableSource:
    """Return the source that a target names."""
    return SOURCES[spec.prefix].open_source(spec.location, opening)
