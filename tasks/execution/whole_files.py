"""whole_files: files that come from elsewhere, held against the sha256 that is known of them.

A file's bytes pass tensor by tensor. They are hashed in the order in which they lie in it, as far
as they are here; what is no tensor of any target is read for this alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import xxhash

from cache.blobs import Blobs, Part
from cache.errors import BlobLost, FileChanged
from tasks.checkpoints.checkpoint import Checkpoint


class WholeFile:
    """One file of a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        name: the file's.
        size: in bytes.
        sha256: what is known of it.
        found: that of its bytes, once all have passed.
        incomplete: whether bytes of it have gone that were not hashed.
        digests: of the tensors that nobody but this read, by key.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, sha256: str) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.size = checkpoint.source.hashes[name].size
        self.sha256 = sha256
        self.found: str | None = None
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
        return self.incomplete or self.found is not None

    @property
    def is_wrong(self) -> bool:
        """Whether it is another file than it was said to be."""
        return self.found is not None and self.found != self.sha256

    def passed(self, key: str) -> bool:
        """Tell whether a tensor's bytes are not wanted any more."""
        stored = self.checkpoint.stored[key]
        return self.is_over or stored.offset + stored.nbytes <= self._at

    def advance(
        self,
        blobs: Blobs,
        locate: Callable[[str], Sequence[Part] | None],
        is_read: Callable[[str], bool],
    ) -> None:
        """Hash what is here of the bytes that come next.

        Args:
            blobs: the store.
            locate: returns where a tensor's bytes lie, or None if they are not here.
            is_read: tells whether a tensor is, or was, to be read by a target.

        Raises:
            CheckpointError: what is no tensor of a target cannot be read.
        """
        while (key := self.awaited) is not None:
            stored = self.checkpoint.stored[key]
            parts = locate(key)
            if parts is None and is_read(key):
                return
            self._take(self._read(self._at, stored.offset))
            skip = self._at - stored.offset  # two tensors may have bytes in common
            if parts is None:
                state = xxhash.xxh3_128()
                at = stored.offset
                for data in self._read(at, at + stored.nbytes):
                    state.update(data)
                    self._take([memoryview(data)[max(0, self._at - at) :]])
                    at += len(data)
                self.digests[key] = state.hexdigest()
            elif skip < stored.nbytes:
                try:
                    self._take(blobs.chunks(_behind(parts, skip)))
                except (BlobLost, FileChanged, FileNotFoundError):  # dropped by another process
                    self.incomplete = True
            self._left.pop()
        if not self.is_over:
            self._take(self._read(self._at, self.size))
            self.found = self._state.hexdigest()

    def _read(self, start: int, stop: int) -> Iterator[bytes]:
        return self.checkpoint.source.read(self.name, start, max(0, stop - start))

    def _take(self, pieces: Iterator[bytes] | Iterator[memoryview] | Sequence[memoryview]) -> None:
        for piece in pieces:
            self._state.update(piece)
            self._at += len(piece)


def _behind(parts: Sequence[Part], skip: int) -> list[Part]:
    """Return the parts without their first bytes."""
    left = []
    for part in parts:
        cut = min(skip, part.length)
        skip -= cut
        if cut < part.length:
            left.append(part._replace(offset=part.offset + cut, length=part.length - cut))
    return left
