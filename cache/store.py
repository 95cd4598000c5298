"""store: one cache folder: its blobs, actions and memos, and the remote that it shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cache import folder
from cache.blobs import CONTAINERS, Blobs
from cache.files import atomic, begun
from cache.lock import Lock
from cache.records.actions import Actions
from cache.records.memos import Memos

if TYPE_CHECKING:  # a floor below; its imports take 15 ms where there is no remote
    from cache.remote.sharing import Sharing


@dataclass(frozen=True)
class Store:
    """What one cache folder holds.

    Attributes:
        blobs: bytes by digest.
        actions: results by key.
        memos: answers.
        root: the folder.
        lock: held by who uses its files.
        sharing: what it has in common with a remote store, if there is one.
        read_only: looking things up leaves nothing behind but memos.
    """

    blobs: Blobs
    actions: Actions
    memos: Memos
    root: Path
    lock: Lock
    sharing: Sharing | None = None
    read_only: bool = False

    @classmethod
    def at(cls, root: Path, *, read_only: bool = False) -> Store:
        """Return the store in folder ``root``, which need not exist yet.

        Args:
            root: the folder.
            read_only: looking things up leaves nothing behind but memos.

        Raises:
            NotACache: the folder holds something else.
        """
        if read_only:
            folder.check(root)
        else:
            folder.claim(root)
            atomic.sweep(root / "blobs")
            begun.sweep(root / "blobs" / CONTAINERS)
        blobs = Blobs(root / "blobs", read_only=read_only)
        memos = Memos(root / "memos")
        actions = Actions(root / "actions", read_only=read_only)
        return cls(blobs, actions, memos, root, Lock(root), read_only=read_only)

    def close(self) -> None:
        """Let go of the remote store: what is queued for it is dropped."""
        if self.sharing:
            self.sharing.close()

    def touch(self, path: Path) -> None:
        """Note that a file that is none of a blob, an action or a memo was used."""
        if not self.read_only:
            atomic.touch(path, path.stat().st_mtime_ns)
