"""sources: the types of source. A new one is one module and one line here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tasks.checkpoints import folder, hub
from tasks.checkpoints.source import Opening, ReadableSource
from tasks.core.spec import SourceSpec


class SourceType(Protocol):
    """What a source's module has."""

    def spec(self, text: str, base: Path) -> SourceSpec:
        """Return what models.toml means by ``text``; ``base`` is the folder that it lies in.

        Raises:
            Mistakes: it means nothing.
        """

    def open_source(self, spec: SourceSpec, opening: Opening) -> ReadableSource:
        """Return the source, whether or not it is there."""


# By what stands before a colon in models.toml; a folder's path is anything else.
SOURCES: dict[str, SourceType] = {"folder": folder, "hf": hub}


def kind(text: str) -> str:
    """Return the type of the source that models.toml calls ``text``."""
    before, colon, _ = text.partition(":")
    return before if colon and before in SOURCES else "folder"


def spec(text: str, base: Path) -> SourceSpec:
    """Return the source that models.toml calls ``text``.

    Args:
        text: a folder's path, or what another type of source has behind its name and a colon.
        base: the folder that models.toml lies in.

    Raises:
        Mistakes: it is no such thing.
    """
    name = kind(text)
    return SOURCES[name].spec(text if name == "folder" else text.removeprefix(f"{name}:"), base)


def open_source(spec: SourceSpec, opening: Opening) -> ReadableSource:
    """Return the source that a target names."""
    return SOURCES[spec.kind].open_source(spec, opening)
