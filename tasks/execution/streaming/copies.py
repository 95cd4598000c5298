"""copies: stored tensors that come from elsewhere, while the cache holds their bytes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from cache.blobs import Part
from cache.digest import digest_record
from cache.errors import BlobLost, WrongLength
from cache.fetched import FetchedBlobs
from cache.files import own
from cache.store import Store
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError


class Copy(NamedTuple):
    """The copy of a stored tensor.

    Attributes:
        checkpoint: the checkpoint.
        key: the tensor's.
        name: the copy's in the store.
    """

    checkpoint: Checkpoint
    key: str
    name: str

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.checkpoint.stored[self.key].nbytes

    @property
    def place(self) -> tuple[str, str, int]:
        """Where it lies: copies come in this order."""
        stored = self.checkpoint.stored[self.key]
        return self.checkpoint.source.location, stored.file, stored.offset


class Copies:
    """Fetches, finds and drops copies. Safe in threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._blobs = FetchedBlobs(store.blobs)
        self._digests: dict[str, str] = {}  # by the copies' names
        self._known: dict[tuple[int, str], Copy] = {}
        self._locks: list[int] = []

    def of(self, checkpoint: Checkpoint, key: str) -> Copy:
        """Return the copy of a stored tensor."""
        at = (id(checkpoint), key)
        if at not in self._known:
            name = digest_record([checkpoint.fingerprint([key]), checkpoint.stored[key].nbytes])
            self._known[at] = Copy(checkpoint, key, name)
        return self._known[at]

    def note(self, checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
        """Take note of stored tensors' digests, by key, that are known without fetching them."""
        for key, digest in digests.items():
            self._digests.setdefault(self.of(checkpoint, key).name, digest)

    def digest(self, copy: Copy) -> str:
        """Return the digest of one that was fetched or noted."""
        return self._digests[copy.name]

    def size(self, copy: Copy) -> int | None:
        """Return how many of its bytes are here; None, it was not begun."""
        return self._blobs.size(copy.name)

    def fetch(self, copy: Copy) -> str:
        """Have the cache hold one, and return its digest.

        Raises:
            CheckpointError: it cannot be read.
            NoRoom: the disk is full.
        """
        source, stored = copy.checkpoint.source, copy.checkpoint.stored[copy.key]

        def read(start: int) -> Iterator[bytes]:
            return source.read(stored.file, stored.offset + start, stored.nbytes - start)

        try:
            digest = self._blobs.fetch(copy.name, stored.nbytes, read)
        except (OSError, WrongLength) as error:
            raise CheckpointError(
                f"{stored.file} of {source.location}: tensor {copy.key} cannot be read: {error}"
            ) from error
        self._digests[copy.name] = digest
        return digest

    def drop(self, copy: Copy) -> None:
        """Remove the bytes of one, whether or not they are here."""
        self._blobs.drop(copy.name, self._digests.get(copy.name))

    def parts(self, copy: Copy) -> list[Part] | None:
        """Return where its bytes lie, or None if they are not here."""
        digest = self._digests.get(copy.name)
        if digest and self._blobs.size(copy.name) == copy.nbytes:
            return [self._blobs.part(copy.name, copy.nbytes)]
        try:  # it lies in its place in a weight file, or as another tensor of the same bytes
            return self._store.blobs.locate(digest, copy.nbytes) if digest else None
        except BlobLost:
            return None

    def is_alone(self, location: str) -> bool:
        """Tell whether no other run fetches from there; what was left there is then this one's.

        Others are told the same until this is closed.
        """
        path = self._store.root / f"fetching-{digest_record(location)}"
        descriptor = own.open_own(path, os.O_RDWR | os.O_CREAT)
        self._locks.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        return True

    def close(self) -> None:
        """Let other runs take what is left."""
        while self._locks:  # each once: its number may soon be another file's
            os.close(self._locks.pop())
