"""sharing: what a cache has in common with other machines, by way of a remote store.

Of an action the remote holds a record, ``{"manifest": …, "blake3": BLAKE3}``, and under that BLAKE3
its *pack*: the bytes of all that it made, one after another. What is fetched is checked against
that, and each tensor against its digest. Of what belongs together there is a *list* besides, all
records in one, so that who has nothing asks once and not for each.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import repeat
from types import MappingProxyType
from typing import Any

import xxhash

from cache.blobs import Blobs, Part, Place
from cache.digest import canonical
from cache.errors import BlobLost, FileChanged, Mismatch, NotFetched, Refused, printable
from cache.records.actions import Actions
from cache.records.manifests import Action, Manifest, ManifestError, Tensor, TensorSpec
from cache.remote.content import blake3_of
from cache.remote.remote import MAX_RECORD_BYTES, Remote

KIND = "actions"
LISTS = "lists"
MOST_NOTES = 100  # of a result, of those that a remote has
FETCHES = 8  # packs fetched at once
EMPTY: Mapping[str, Place] = MappingProxyType({})

Locate = Callable[[str, Tensor], Sequence[Part]]  # by a tensor's name


@dataclass(frozen=True)
class Pack:
    """Blobs that lie in a remote as one.

    Attributes:
        blake3: of all bytes.
        tensors: whose the blobs are, each once, in order.
    """

    blake3: str
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """The size of all."""
        return sum(tensor.nbytes for tensor in self.tensors)


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
        self._lists: dict[str, dict[str, Any]] = {}  # records by the action's key, by the list's
        self._listed: dict[str, Any] = {}  # all that are known, by the action's key
        self._packs: dict[str, Pack | None] = {}  # by the action's key, of those that were read
        self._pushing: dict[str, Future[None]] = {}  # by the action's key
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

    def fetch_all(
        self, wanted: Iterable[tuple[str, Tensor]], places: Mapping[str, Place] = EMPTY
    ) -> None:
        """Make blobs of this cache of all those that can be had, many at once.

        Args:
            wanted: tensors, each with the key of the action that made it.
            places: where blobs belong, by digest, if it is known.
        """
        by_key: dict[str, list[Tensor]] = {}
        for key, tensor in wanted:
            by_key.setdefault(key, []).append(tensor)
        list(self._fetching.map(self._fetch_missing, by_key, by_key.values(), repeat(places)))

    def pack(self, key: str, tensor: Tensor) -> Pack | None:
        """Return what the remote has of the action of ``key``, by its records, if with a tensor."""
        if key not in self._packs and self.read(key) is None:
            return None
        pack = self._packs[key]
        return pack if pack and tensor.digest in {each.digest for each in pack.tensors} else None

    def _fetch_missing(
        self, key: str, wanted: Sequence[Tensor], places: Mapping[str, Place]
    ) -> None:
        """Make all that the action of ``key`` made blobs of this cache, if one of them is none."""
        with self.actions.running(f"fetch {key}"):
            missing = (t for t in wanted if not self.blobs.has(t.digest, t.nbytes))
            packs = (pack for tensor in missing if (pack := self.pack(key, tensor)))
            if pack := next(packs, None):
                self._fetch(pack, places)

    def _fetch(self, pack: Pack, places: Mapping[str, Place]) -> None:
        sizes = [tensor.nbytes for tensor in pack.tensors]
        known = [
            place
            for each in pack.tensors
            if (place := places.get(each.digest)) and place.length == each.nbytes
        ]  # by what is known here: of a tensor's size, too, a remote may say anything
        pieces = self.remote.fetch(pack.blake3, pack.nbytes)
        try:
            self.blobs.write_together(sizes, pieces, known if len(known) == len(sizes) else ())
        except NotFetched:
            pass
        except Mismatch:
            with self._lock:
                self._corrupt.add(pack.blake3)  # so that it is put there anew

    def push(self, manifest: Manifest, locate: Locate | None) -> None:
        """Have a result uploaded, by and by.

        Args:
            manifest: the result.
            locate: says where its tensors lie; None uploads the manifest alone.
        """
        pushing = self.remote.later(lambda: self.push_now(manifest, locate))
        if pushing:
            self._pushing[manifest.action.key] = pushing

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
        try:
            blake3 = self._push_pack(manifest, locate) if locate else None
        except (BlobLost, FileChanged, Mismatch, OSError):
            return False  # gone or changed meanwhile: it is for the build to say so
        record = {"manifest": json.loads(manifest.to_bytes()), "blake3": blake3}
        self.remote.put_record(KIND, key, record, ask_first=ask_first)
        self._note(key, record, manifest, blake3)
        return True

    def _push_pack(self, manifest: Manifest, locate: Locate) -> str:
        """Upload a result's pack unless it is there, and return its BLAKE3.

        Raises:
            BlobLost: a tensor's bytes are not what its digest says.
            FileChanged: as ``Blobs.read_into``.
        """
        parts = {t.digest: locate(name, t) for name, t in sorted(manifest.tensors.items())}
        tensors = _packed(manifest)

        def digested() -> Iterator[memoryview]:
            for tensor in tensors:
                state = xxhash.xxh3_128()
                for piece in self.blobs.chunks(parts[tensor.digest]):
                    state.update(piece)
                    yield piece
                if state.hexdigest() != tensor.digest:
                    raise BlobLost(tensor.digest, "its bytes are others")

        pack = Pack(blake3_of(digested()), tensors)
        source = _Bytes(self.blobs, [part for each in tensors for part in parts[each.digest]])
        self.remote.push(pack.blake3, pack.nbytes, source, replace=pack.blake3 in self._corrupt)
        return pack.blake3

    def push_list(self, key: str, actions: Sequence[str]) -> None:
        """Have the records of results that belong together uploaded in one, by and by.

        Args:
            key: of the list.
            actions: the results' keys. Of those that the remote has not, it says nothing.
        """
        before = [self._pushing[each] for each in actions if each in self._pushing]

        def push() -> None:
            wait(before)  # which have begun: they came first
            self.read_list(key)
            known = [each for each in actions if each in self._packs or self.read(each)]
            records = {each: self._listed[each] for each in known}
            small = len(canonical(records)) < MAX_RECORD_BYTES  # else each is asked for
            if small and records != self._lists[key]:
                self.remote.put_record(LISTS, key, records)
                self._lists[key] = records

        self.remote.later(push)

    def read_list(self, key: str) -> None:
        """Have the records of a list at hand, if there is one."""
        if key in self._lists:
            return
        records = self.remote.record(LISTS, key)
        self._lists[key] = records if isinstance(records, dict) else {}
        for each, listed in self._lists[key].items():
            self._listed.setdefault(each, listed)  # where it is: other threads add to it

    def read(self, key: str) -> Manifest | None:
        """Return what the remote has recorded under ``key``, if anything that can be used."""
        listed = self._read(key, self._listed.get(key))
        return listed or self._read(key, self.remote.record(KIND, key))

    def _read(self, key: str, record: Any) -> Manifest | None:
        try:
            if record is None:
                return None
            manifest = Manifest.from_bytes(canonical(record["manifest"]))
            notes = tuple(printable(note) for note in manifest.notes[:MOST_NOTES])
            manifest = replace(manifest, notes=notes)
            blake3 = record["blake3"]
        except (ManifestError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # damaged: as good as none, and replaced when it was made again
        if manifest.action.key != key:
            return None
        self._note(key, record, manifest, blake3 if _is(blake3) else None)
        return manifest

    def _note(self, key: str, record: Any, manifest: Manifest, blake3: str | None) -> None:
        self._listed[key] = record  # first: of what is among the packs, lists are made
        self._packs[key] = Pack(blake3, _packed(manifest)) if blake3 else None


def _packed(manifest: Manifest) -> tuple[Tensor, ...]:
    """Return the tensors of a result in the order of its pack, each digest once."""
    by_digest = {tensor.digest: tensor for _, tensor in sorted(manifest.tensors.items())}
    return tuple(by_digest.values())


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
