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
from cache.records.memos import Memos
from cache.remote.content import blake3_of
from cache.remote.remote import MAX_RECORD_BYTES, Remote
from cache.remote.transport import PARALLEL, PIECE_BYTES

KIND = "actions"
LISTS = "lists"
MOST_NOTES = 100  # of a result, of those that a remote has
FETCHES = 8  # packs fetched at once, where there is the memory
FETCH_BYTES = (PARALLEL + 1) * PIECE_BYTES  # of memory, that one of them takes
FALSE = "false_packs"  # the memos of packs that hold other bytes than their records say
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

    @property
    def question(self) -> list[Any]:
        """Whether the bytes are the blobs, for memos: wherever they lie, the answer is the same."""
        return [self.blake3, [[tensor.digest, tensor.nbytes] for tensor in self.tensors]]


@dataclass(frozen=True)
class _Bytes:
    """A blob's bytes, from its beginning whenever they are iterated."""

    blobs: Blobs
    parts: Sequence[Part]

    def __iter__(self) -> Iterator[bytes]:
        # Copies, since the pieces that come of the store are valid one at a time.
        return (bytes(piece) for piece in self.blobs.chunks(self.parts))


class Sharing:
    """A cache's actions and blobs, read through from ``remote`` and written behind to it.

    Args:
        actions: the cache's.
        blobs: the cache's.
        memos: the cache's.
        remote: the store.
        memory: bytes that all that are fetched at once may take; one always is.
    """

    def __init__(
        self,
        actions: Actions,
        blobs: Blobs,
        memos: Memos,
        remote: Remote,
        *,
        memory: int = FETCHES * FETCH_BYTES,
    ) -> None:
        self.actions = actions
        self.blobs = blobs
        self.memos = memos
        self.remote = remote
        self._lock = threading.Lock()
        self._lists: dict[str, dict[str, Any]] = {}  # records by the action's key, by the list's
        self._listed: dict[str, Any] = {}  # all that are known, by the action's key
        self._packs: dict[str, Pack | None] = {}  # by the action's key, of those that were read
        self._pushing: dict[str, Future[None]] = {}  # by the action's key
        self._corrupt: set[str] = set()  # BLAKE3
        self._refused: set[str] = set()  # keys
        self._at_once = max(1, min(FETCHES, memory // FETCH_BYTES))
        self._fetching = ThreadPoolExecutor(self._at_once, "fetch")

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
        written = self._fetching.map(self._fetch_missing, by_key, by_key.values(), repeat(places))
        self.blobs.meter.written += sum(written)  # each thread has its own

    def memory(self, count: int) -> int:
        """Return how many bytes of memory it takes at most to fetch what so many actions made."""
        return min(count, self._at_once) * FETCH_BYTES

    def pack(self, key: str, tensor: Tensor) -> Pack | None:
        """Return what the remote has of the action of ``key``, by its records, if with a tensor.

        What was found to be damaged is not there.
        """
        if key not in self._packs and self.read(key) is None:
            return None
        pack = self._packs[key]
        if pack is None or pack.blake3 in self._corrupt:
            return None
        return pack if tensor.digest in {each.digest for each in pack.tensors} else None

    def _fetch_missing(
        self, key: str, wanted: Sequence[Tensor], places: Mapping[str, Place]
    ) -> int:
        """Make all that the action of ``key`` made blobs of this cache, if one of them is none.

        Returns:
            How many bytes were written.
        """
        before = self.blobs.meter.written
        with self.actions.running(f"fetch {key}"):
            missing = (t for t in wanted if not self.blobs.has(t.digest, t.nbytes))
            packs = (pack for tensor in missing if (pack := self.pack(key, tensor)))
            if pack := next(packs, None):
                self._fetch(key, pack, places)
        return self.blobs.meter.written - before

    def _fetch(self, key: str, pack: Pack, places: Mapping[str, Place]) -> None:
        """Fetch a pack; what is damaged, twice in a row, is told, and replaced by who may."""
        if self.memos.get(FALSE, pack.question, bool):
            self._refuse_pack(key, pack, "as it was before")
            return
        for tries_left in (1, 0):
            try:
                wrong = self._write(pack, places)
                break
            except NotFetched:
                return
            except Mismatch as error:
                if not tries_left:
                    with self._lock:
                        self._corrupt.add(pack.blake3)  # so that it is put there anew
                    self.remote.report_damage(error)
                    return
        if wrong:
            # As long as the record says so: other bytes would have another name.
            self.memos.put(FALSE, pack.question, True)
            self._refuse_pack(key, pack, f"as {len(wrong)} of {len(pack.tensors)} digests tell")

    def _write(self, pack: Pack, places: Mapping[str, Place]) -> list[str]:
        """Fetch a pack; return the digests that other bytes came for.

        Raises:
            NotFetched: as ``Remote.fetch``.
            Mismatch: as ``Remote.fetch``.
        """
        sizes = {tensor.digest: tensor.nbytes for tensor in pack.tensors}
        pieces = self.remote.fetch(pack.blake3, pack.nbytes)
        return self.blobs.write_together(sizes, pieces, places)

    def _refuse_pack(self, key: str, pack: Pack, how: str) -> None:
        """Tell of a pack that its record is not of, and have the record put there anew."""
        with self._lock:
            self._refused.add(key)
            self._packs[key] = None
        cause = f"it is not what record {KIND}/{key} says, {how}"
        self.remote.report_damage(Mismatch(pack.blake3, cause))

    def close(self) -> None:
        """Stop: what is queued, to be fetched or uploaded, is dropped."""
        self._fetching.shutdown(wait=False, cancel_futures=True)
        self.remote.close()

    def push(self, manifest: Manifest, locate: Locate | None) -> None:
        """Have a result uploaded, by and by.

        Args:
            manifest: the result.
            locate: says where its tensors lie; None uploads the manifest alone.
        """
        pushing = self.remote.later(lambda: self.push_now(manifest, locate))
        if pushing:
            self._pushing[manifest.action.key] = pushing

    def pushed(self, key: str) -> bool:
        """Tell whether the remote has the bytes of a result, once it was uploaded.

        Args:
            key: of the action, whose result was found there or is being pushed.
        """
        if pushing := self._pushing.get(key):
            wait([pushing])
            return self.remote.writable and self._packs.get(key) is not None
        known = key in self._packs or self.read(key) is not None
        return known and self.remote.readable and self._packs[key] is not None

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
        corrupt = pack.blake3 in self._corrupt
        if self.remote.push(pack.blake3, pack.nbytes, source, replace=corrupt) and corrupt:
            with self._lock:
                self._corrupt.discard(pack.blake3)
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
