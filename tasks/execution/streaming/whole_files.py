"""whole_files: files that come from elsewhere, held against the sha256 that is known of them.

A file's bytes pass tensor by tensor. They are hashed in the order in which they lie in it, as far
as they are here; what is no tensor of any target is read for this alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import xxhash

from cache.blobs import Blobs, Part
from cache.digest import digest_record
from cache.errors import BlobLost, CacheError, FileChanged
from cache.records.memos import Memos
from cache.store import Store
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.stored import Stored
from tasks.core.errors import BuildError
from tasks.execution.streaming.copies import Copies, Copy

KIND = "whole-files"  # of memos: digests of tensors, by the sha256 of the file that they are of


class WholeFile:
    """One file of a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        name: the file's.
        size: in bytes.
        sha256: what is known of it.
        actual: that of its bytes, once all have passed.
        incomplete: whether bytes of it have gone that were not hashed.
        digests: of the tensors that nobody but this read, by key.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, sha256: str) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.size = checkpoint.source.hashes[name].size
        self.sha256 = sha256
        self.actual: str | None = None
        self.incomplete = False
        self.digests: dict[str, str] = {}
        self._state = hashlib.sha256()
        self._at = 0
        stored = ((key, s) for key, s in checkpoint.stored.items() if s.file == name and s.nbytes)
        self._left = sorted(stored, key=lambda of: -of[1].offset)  # the next one last

    @property
    def awaited(self) -> str | None:
        """The key of the tensor whose bytes come next; None behind the last one."""
        return self._left[-1][0] if self._left and not self.is_over else None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is hashed."""
        return self.incomplete or self.actual is not None

    @property
    def is_wrong(self) -> bool:
        """Whether it is another file than it was said to be."""
        return self.actual is not None and self.actual != self.sha256

    def passed(self, key: str) -> bool:
        """Tell whether a tensor's bytes are not wanted any more."""
        stored = self.checkpoint.stored[key]
        return self.is_over or stored.offset + stored.nbytes <= self._at

    def advance(
        self,
        blobs: Blobs,
        copies: Copies,
        is_read: Callable[[Copy], bool],
    ) -> None:
        """Hash what is here of the bytes that come next.

        Args:
            blobs: the store.
            copies: of the tensors.
            is_read: tells whether one is, or was, to be read by a target.

        Raises:
            CheckpointError: what is no tensor of a target cannot be read.
        """
        while (key := self.awaited) is not None:
            stored = self.checkpoint.stored[key]
            copy = copies.of(self.checkpoint, key)
            parts = copies.parts(copy)
            if parts is None and is_read(copy):
                return
            self._take(self._read(self._at, stored.offset))
            if parts is None or not self._take_copy(stored, blobs, copies, copy, parts):
                read = self._read(stored.offset, stored.offset + stored.nbytes)
                self.digests[key] = self._take_tensor(stored, read)
            self._left.pop()
        if not self.is_over:
            self._take(self._read(self._at, self.size))
            self.actual = self._state.hexdigest()

    def _take_copy(
        self, stored: Stored, blobs: Blobs, copies: Copies, copy: Copy, parts: Sequence[Part]
    ) -> bool:
        """Hash a copy's bytes; tell whether that is done.

        What a power cut, say, left of it may be other bytes: they are forgotten, here and there.
        """
        before = self._state.copy(), self._at
        digest = copies.digest(copy)
        try:
            if self._take_tensor(stored, blobs.chunks(parts)) == digest:
                return True
        except (BlobLost, FileChanged, FileNotFoundError):  # dropped by another process
            self.incomplete = True
            return True
        self._state, self._at = before
        copies.drop(copy)
        blobs.drop_if_wrong(digest)
        return False

    def _take_tensor(self, stored: Stored, pieces: Iterator[bytes] | Iterator[memoryview]) -> str:
        """Hash a tensor's bytes, but for those that it has in common with the one before it.

        Returns:
            Its digest.
        """
        state = xxhash.xxh3_128()
        at = stored.offset
        for data in pieces:
            state.update(data)
            self._take([memoryview(data)[max(0, self._at - at) :]])
            at += len(data)
        return state.hexdigest()

    def _read(self, start: int, stop: int) -> Iterator[bytes]:
        return self.checkpoint.source.read(self.name, start, max(0, stop - start))

    def _take(self, pieces: Iterator[bytes] | Iterator[memoryview] | Sequence[memoryview]) -> None:
        for piece in pieces:
            self._state.update(piece)
            self._at += len(piece)


class WholeFiles:
    """The files whose bytes pass in a run, as far as their sha256 is known."""

    def __init__(self, store: Store, copies: Copies) -> None:
        self._store = store
        self._copies = copies
        self._files: dict[tuple[str, str], WholeFile] = {}  # by where they lie

    def watch(self, copy: Copy) -> None:
        """Have the file of a copy hashed as it passes, if its sha256 is known."""
        location, file, _ = copy.place
        if (location, file) not in self._files and (sha256 := _sha256(copy.checkpoint, file)):
            self._files[location, file] = WholeFile(copy.checkpoint, file, sha256)

    def of(self, copy: Copy) -> WholeFile | None:
        """Return the file that a copy is of, if it is watched."""
        return self._files.get(copy.place[:2])

    def advance(self, is_read: Callable[[Copy], bool]) -> None:
        """Hash what is here of each file's bytes that come next.

        Args:
            is_read: tells whether a copy is, or was, to be read by a target.
        """
        for file in self._files.values():
            if file.is_over:
                continue
            try:
                file.advance(self._store.blobs, self._copies, is_read)
            except (BuildError, CacheError, OSError):  # no build fails for what it does not use
                file.incomplete = True
            if file.actual == file.sha256:
                self._remember(file)

    def _remember(self, file: WholeFile) -> None:
        """Remember that these tensors are of the file of its sha256."""
        checkpoint, name = file.checkpoint, file.name
        digests = dict(file.digests)
        for key, stored in checkpoint.stored.items():
            if stored.file == name and stored.nbytes and key not in digests:
                digests[key] = self._copies.digest(self._copies.of(checkpoint, key))
        question = _question(checkpoint, name, file.sha256)
        self._store.memos.put(KIND, question, _table(checkpoint, name, digests))

    def wrong(self, checkpoint: Checkpoint) -> dict[str, WholeFile]:
        """Return the files whose bytes have all passed, and are not those of their sha256."""
        files = self._files.values()
        return {f.name: f for f in files if f.checkpoint is checkpoint and f.is_wrong}


def unverified(memos: Memos, checkpoint: Checkpoint, digests: Mapping[str, str]) -> list[str]:
    """Return the files of which a sha256 is known, but not that all tensors are of that file.

    Args:
        memos: where that is remembered.
        checkpoint: the checkpoint.
        digests: of all its stored tensors, by key.
    """
    known = {name: sha256 for name in checkpoint.stamps if (sha256 := _sha256(checkpoint, name))}
    return [
        name
        for name, sha256 in known.items()
        if memos.get(KIND, _question(checkpoint, name, sha256), str)
        != _table(checkpoint, name, digests)
    ]


def _sha256(checkpoint: Checkpoint, file: str) -> str | None:
    """Return what a file's sha256 is said to be, if it is fetched."""
    return None if checkpoint.source.path(file) else checkpoint.sha256(file)


def _question(checkpoint: Checkpoint, file: str, sha256: str) -> list[Any]:
    return [checkpoint.source.location, file, *checkpoint.stamps[file], sha256]


def _table(checkpoint: Checkpoint, file: str, digests: Mapping[str, str]) -> str:
    """Return the digest of a file's tensors' digests."""
    stored = checkpoint.stored.items()
    return digest_record([[k, digests[k]] for k, s in stored if s.file == file and s.nbytes])
