"""store: one cache folder: its blobs, actions and memos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache import files
from cache.actions import Actions
from cache.blobs import Blobs
from cache.memos import Memos


@dataclass(frozen=True)
class Store:
    """What one cache folder holds."""

    blobs: Blobs
    actions: Actions
    memos: Memos

    @classmethod
    def at(cls, root: Path) -> Store:
        """Return the store in folder ``root``, which need not exist yet."""
        files.sweep(root / "blobs")
        return cls(Blobs(root / "blobs"), Actions(root / "actions"), Memos(root / "memos"))
