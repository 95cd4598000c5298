"""sharing: what a cache has in common with other machines, by way of a remote store.

Of an action the remote holds a record, ``{"manifest": …, "blake3": {digest: BLAKE3}}``, and
under their BLAKE3 the blobs that this names. What is fetched is checked against both digests.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from cache.blobs import Blobs, Part
from cache.digest import canonical
from cache.errors import BlobLost, FileChanged, Mismatch, NotFetched, Refused, printable
from cache.records.actions import Actions
from cache.records.manifests import Action, Manifest, ManifestError, Tensor, TensorSpec
from cache.remote.content import blake3_of
from cache.remote.remote import Remote

KIND = "actions"
MOST_NOTES = 100  # of a result, of those that a remote has
FETCHES = 8  # blobs fetched at once

Locate = Callable[[str, Tensor], Sequence[Part]]  # by a tensor's name


@dataclass(frozen=True)
class _Bytes:
    """A blob's bytes, from its beginning whenever they are iterated."""

    blobs: Blobs
    parts: Sequence[Part]

    def __iter__(self) -> Iterator[bytes]:
        # Copies, since the pieces that come of the store are valid one at a time.
        return (bytes(piece) for piece in self.blobs.chunks(self.parts))


class Sharing:
    """A cache's actions and blobs, read through from ``remote`` and written behind to it."""

    def __init__(self, actions: Actions, blobs: Blobs, remote: Remote) -> None:
        self.actions = actions
        self.blobs = blobs
        self.remote = remote
        self._lock = threading.Lock()
        self._names: dict[str, Mapping[str, str]] = {}  # BLAKE3 by digest, by the action's key
        self._pushed: dict[str, str] = {}  # BLAKE3 by digest
        self._corrupt: set[str] = set()  # BLAKE3
        self._refused: set[str] = set()  # keys
        self._fetching = ThreadPoolExecutor(FETCHES, "fetch")

    def find(self, action: Action, outline: Mapping[str, TensorSpec] | None) -> Manifest | None:
        """Return what the action made elsewhere, recorded here from now on; see ``look_up``."""
        manifest = self.look_up(action, outline)
        if manifest is not None:
            self.actions.put(manifest)
        return manifest

    def look_up(self, action: Action, outline: Mapping[str, TensorSpec] | None) -> Manifest | None:
        """Return what the action made elsewhere, if it can have made that.

        Args:
            action: the action.
            outline: what it makes, whatever the digests; None: that is not known.
        """
        manifest = self.read(action.key)
        if manifest is None or manifest.action != action:
            return None
        if outline is not None and (name := _differing(manifest.tensors, outline)):
            self._refuse(action, name)
            return None
        return manifest

    def agrees(self, ours: Manifest) -> bool:
        """Tell whether the remote has what was made here; if it has another result, it is refused.

        So what the remote says of an action is compared, and not used.
        """
        theirs = self.look_up(ours.action, None)
        if theirs is None or theirs.tensors == ours.tensors:
            return theirs is not None
        both = {**theirs.tensors, **ours.tensors}
        self._refuse(
            ours.action, next(n for n in both if theirs.tensors.get(n) != ours.tensors.get(n))
        )
        return False

    def _refuse(self, action: Action, tensor: str) -> None:
        with self._lock:
            self._refused.add(action.key)
        name = f"{KIND}/{action.key}"
        self.remote.refuse(Refused(name, f"{tensor} is not what {action.stage} makes of it"))

    def fetch_all(self, wanted: Iterable[tuple[str, Tensor]]) -> None:
        """Make blobs of this cache of all those that can be had, many at once.

        Args:
            wanted: tensors, each with the key of the action that made it.
        """
        list(self._fetching.map(lambda each: self.fetch(*each), wanted))

    def has(self, key: str, tensor: Tensor) -> bool:
        """Tell whether, by its records, the remote has a blob that the action of ``key`` made."""
        if key not in self._names and self.read(key) is None:
            return False
        return tensor.digest in self._names[key]

    def fetch(self, key: str, tensor: Tensor) -> bool:
        """Make a blob that the action of ``key`` made a blob of this cache, if it can be had."""
        with self.actions.running(f"fetch {tensor.digest}"):
            if self.blobs.has(tensor.digest, tensor.nbytes):
                return True
            if not self.has(key, tensor):
                return False
            return self.fetch_blob(self._names[key][tensor.digest], tensor)

    def fetch_blob(self, blake3: str, tensor: Tensor) -> bool:
        """Make a remote's blob a blob of this cache; tell whether it is the one that was meant."""
        try:
            with self.blobs.writing(tensor.nbytes) as writer:
                for piece in self.remote.fetch(blake3, tensor.nbytes):
                    writer.write(piece)
        except NotFetched:
            return False
        except Mismatch:
            with self._lock:
                self._corrupt.add(blake3)  # so that it is put there anew
            return False
        return writer.digest == tensor.digest

    def push(self, manifest: Manifest, locate: Locate | None) -> None:
        """Have a result uploaded, by and by.

        Args:
            manifest: the result.
            locate: says where its tensors lie; None uploads the manifest alone.
        """
        self.remote.later(lambda: self.push_now(manifest, locate))

    def push_now(
        self, manifest: Manifest, locate: Locate | None, *, ask_first: bool = False
    ) -> bool:
        """Upload a result, and tell whether that was possible.

        A record that names blobs is not replaced by one that names none, unless it was refused.

        Args:
            manifest: the result.
            locate: as for ``push``.
            ask_first: whether the record may be there already.
        """
        key = manifest.action.key
        if not locate and key not in self._refused and self.read(key):
            return True
        names = {}
        try:
            if locate:
                for name, tensor in manifest.tensors.items():
                    names[tensor.digest] = self.push_blob(tensor, locate(name, tensor))
        except (BlobLost, FileChanged, Mismatch, OSError):
            return False  # gone or changed meanwhile: it is for the build to say so
        record = {"manifest": json.loads(manifest.to_bytes()), "blake3": names}
        self.remote.put_record(KIND, key, record, ask_first=ask_first)
        return True

    def push_blob(self, tensor: Tensor, parts: Sequence[Part]) -> str:
        """Upload a blob unless it is there, and return its BLAKE3.

        Raises:
            BlobLost: its bytes are not what its name says.
            FileChanged: as ``Blobs.read_into``.
        """
        with self.actions.running(f"push {tensor.digest}"):
            if tensor.digest in self._pushed:
                return self._pushed[tensor.digest]
            source = _Bytes(self.blobs, parts)
            state = xxhash.xxh3_128()

            def digested() -> Iterator[bytes]:
                for piece in source:
                    state.update(piece)
                    yield piece

            blake3 = blake3_of(digested())
            if state.hexdigest() != tensor.digest:
                raise BlobLost(tensor.digest, "its bytes are others")
            self.remote.push(blake3, tensor.nbytes, source, replace=blake3 in self._corrupt)
            self._pushed[tensor.digest] = blake3
            return blake3

    def read(self, key: str) -> Manifest | None:
        """Return what the remote has recorded under ``key``, if anything that can be used."""
        record: Any = self.remote.record(KIND, key)
        try:
            if record is None:
                return None
            manifest = Manifest.from_bytes(canonical(record["manifest"]))
            notes = tuple(printable(note) for note in manifest.notes[:MOST_NOTES])
            manifest = replace(manifest, notes=notes)
            names = {digest: blake3 for digest, blake3 in record["blake3"].items() if _is(blake3)}
        except (ManifestError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # damaged: as good as none, and replaced when it was made again
        if manifest.action.key != key:
            return None
        self._names[key] = names
        return manifest


def _differing(tensors: Mapping[str, Tensor], outline: Mapping[str, TensorSpec]) -> str:
    """Return the first tensor, by name, that has another dtype or shape, or is in one of them."""
    actual, expected = (
        {name: (tensor.dtype, tensor.shape) for name, tensor in some.items()}
        for some in (tensors, outline)
    )
    names = sorted(actual.keys() | expected.keys())
    return next((name for name in names if actual.get(name) != expected.get(name)), "")


def _is(blake3: Any) -> bool:
    """Tell whether a remote's word can be a BLAKE3: it becomes part of a path."""
    return isinstance(blake3, str) and re.fullmatch(r"[0-9a-f]{64}", blake3) is not None
