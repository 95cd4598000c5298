"""workspace: where things lie beside models.toml: what is built, reports, and all the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

BUILD = "build"
REPORTS = "reports"
STATE = ".mlx-make"
CACHE_DIR = f"{STATE}/cache"
TRASH = "trash"  # within STATE: what is being removed


@dataclass(frozen=True)
class Workspace:
    """The folder of one models.toml.

    Attributes:
        folder: where models.toml lies.
    """

    folder: Path

    @cached_property
    def state(self) -> Path:
        """The folder of what belongs to this models.toml alone, and is no model."""
        return self.folder / STATE

    @cached_property
    def reports(self) -> Path:
        """The folder of pages on the built models."""
        return self.folder / REPORTS

    @cached_property
    def trash(self) -> Path:
        """The folder of what is being removed."""
        return self.state / TRASH

    @cached_property
    def drafts(self) -> Path:
        """The folder that says which weight files of the cache a build has begun."""
        return self.state / "drafts"

    @cached_property
    def _manifests(self) -> str:
        return f"{self.state}/manifests"

    def built(self, target: str) -> Path:
        """Return the folder of a built model."""
        return self.folder / BUILD / target

    def manifest(self, target: str, stage: str, layer: str) -> str:
        """Return where a node's manifest lies. A string: there are thousands of them."""
        return f"{self._manifests}/{target}/{stage}/{layer}.json"

    def all_packed(self) -> list[Path]:
        """Return where the manifests lie of all packings on record."""
        return list(self.state.glob("manifests/*/pack.json"))

    def packed(self, target: str) -> Path:
        """Return where the manifest of a target's packing lies."""
        return self.state / "manifests" / target / "pack.json"

    def left(self, target: str) -> Path:
        """Return where it lies what a clean left in a target's folder, since not built here."""
        return self.state / "left" / f"{target}.json"

    def packed_before(self, target: str) -> Path:
        """Return where that of the packing before lies, of another result."""
        return self.state / "manifests" / target / "pack.before.json"

    def published(self, target: str) -> Path:
        """Return where it lies what was last published of a target."""
        return self.state / "published" / f"{target}.json"

    def may_be_packed(self, target: str) -> Path:
        """Return where that of one lies that may be what is in the target's folder, or not.

        So of one that is about to take the folder's place, or that is not to be trusted any more.
        """
        return self.state / "manifests" / target / "pack.next.json"
