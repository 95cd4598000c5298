"""survey: what lies in a cache folder, and what of it is wanted."""

from __future__ import annotations

import os
import re
import stat
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from heapq import nlargest
from itertools import chain
from pathlib import Path
from typing import cast

from msgspec import Struct

from cache import folder
from cache.blobs import Blobs, Part
from cache.files import atomic
from cache.records.kinds import RecordKind
from cache.records.manifests import Manifest
from cache.records.sealed import Damaged

CORRUPT = "corrupt"  # the folder to which `verify` moves what is
_FOLDERS = ("blobs", "actions", "memos", CORRUPT)  # nothing beside them is ever looked at
_KEYS = {
    "blob": re.compile(r"blobs/([0-9a-f]{2})/([0-9a-f]{30})"),
    "reference": re.compile(r"blobs/([0-9a-f]{2})/([0-9a-f]{30})\.parts"),
    "container": re.compile(r"blobs/(packs)/([0-9a-f]{32})"),
    "action": re.compile(r"actions/([0-9a-f]{2})/([0-9a-f]{30})\.json"),
    "memo": re.compile(r"memos/[^/]+/([0-9a-f]{2})/([0-9a-f]{30})\.json"),
}
_NAMES: dict[str, Callable[[str], str]] = {  # of those that there may be millions of, by key
    "blob": lambda key: f"blobs/{key[:2]}/{key[2:]}",
    "reference": lambda key: f"blobs/{key[:2]}/{key[2:]}.parts",
    "action": lambda key: f"actions/{key[:2]}/{key[2:]}.json",
}
_DIGEST_BYTES = 16


class File(Struct, frozen=True):
    """A file of the cache; or a folder, if it is temporary, or a record of another kind.

    Attributes:
        root: the cache's folder.
        name: where it lies below.
        kind: blob, reference, container, action, memo, temporary, corrupt, or another kind of
            record. Files that nobody here made are of none, and left alone.
        key: the digest or key that names it.
        size: bytes; of a container, in which there may be holes, those that the disk has.
        used: when it was last used, Unix time, to the hour (``atomic.touch``).
    """

    root: str
    name: str
    kind: str
    key: str
    size: int
    used: float

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.root, self.name)


class Files(Mapping[str, File]):
    """The files of one kind by key, a digest, in its order: 32 bytes each, for there are millions.

    Attributes:
        sizes: of the files.
        used: when each was last used.
    """

    def __init__(self, root: str, kind: str) -> None:
        self._root = root
        self._kind = kind
        self._name = _NAMES[kind]
        self._keys = bytearray()
        self.sizes = array("Q")
        self.used = array("d")

    def add(self, key: str, size: int, used: float) -> None:
        """Add a file, whose key is above all that are here."""
        self._keys += bytes.fromhex(key)
        self.sizes.append(size)
        self.used.append(used)

    def at(self, index: int) -> File:
        """Return a file by its place in the order."""
        key = self.key_at(index)
        size, used = self.sizes[index], self.used[index]
        return File(self._root, self._name(key), self._kind, key, size, used)

    def key_at(self, index: int) -> str:
        """Return a key by its place in the order."""
        return self._bytes_at(index).hex()

    def find(self, key: str) -> int | None:
        """Return a key's place in the order, if it is there."""
        try:
            wanted = bytes.fromhex(key)
        except ValueError:
            return None
        index = bisect_left(range(len(self)), wanted, key=self._bytes_at)
        return index if index < len(self) and self._bytes_at(index) == wanted else None

    def __getitem__(self, key: str) -> File:
        if (index := self.find(key)) is None:
            raise KeyError(key)
        return self.at(index)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) is not None

    def __iter__(self) -> Iterator[str]:
        return map(self.key_at, range(len(self)))

    def __len__(self) -> int:
        return len(self.sizes)

    def _bytes_at(self, index: int) -> bytes:
        return bytes(self._keys[_DIGEST_BYTES * index : _DIGEST_BYTES * (index + 1)])


class Owned(Mapping[str, int]):
    """The bytes of each blob that the cache itself has, in a file or in a container.

    Attributes:
        files: those that have a file.
        inside: the others.
    """

    def __init__(self, files: Files, inside: Mapping[str, int]) -> None:
        self.files = files
        self.inside = {key: size for key, size in inside.items() if key not in files}

    def __getitem__(self, digest: str) -> int:
        index = self.files.find(digest)
        return self.inside[digest] if index is None else self.files.sizes[index]

    def __iter__(self) -> Iterator[str]:
        return chain(self.files, self.inside)

    def __len__(self) -> int:
        return len(self.files) + len(self.inside)

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(self.files.sizes) + sum(self.inside.values())

    def largest(self, count: int) -> dict[str, int]:
        """Return the largest of them, in that order."""
        sizes = self.files.sizes
        found = nlargest(count, range(len(sizes)), key=sizes.__getitem__)
        some = [(self.files.key_at(index), sizes[index]) for index in found]
        return dict(nlargest(count, [*some, *self.inside.items()], key=lambda blob: blob[1]))


@dataclass(frozen=True)
class Survey:
    """What a cache folder held when it was looked through.

    Attributes:
        blobs: the store's.
        kinds: the files by kind and key.
        others: kinds of records besides the cache's own, by name.
    """

    blobs: Blobs
    kinds: Mapping[str, Mapping[str, File]]
    others: Mapping[str, RecordKind] = field(default_factory=dict)

    def of(self, kind: str) -> Mapping[str, File]:
        """Return the files of a kind by key."""
        return self.kinds.get(kind, {})

    @property
    def files(self) -> Iterator[File]:
        """All files."""
        for files in self.kinds.values():
            yield from (
                map(files.at, range(len(files))) if isinstance(files, Files) else (files.values())
            )

    def count(self, kind: str) -> tuple[int, int]:
        """Return how many files of a kind there are, and their bytes."""
        files = self.of(kind)
        sizes = files.sizes if isinstance(files, Files) else [f.size for f in files.values()]
        return len(files), sum(sizes)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.count(kind)[1] for kind in self.kinds)

    @cached_property
    def parts(self) -> dict[str, list[Part]]:
        """Where each reference that can be read says that its bytes lie."""
        parts = {}
        for digest, file in self.of("reference").items():
            try:
                parts[digest] = self.blobs.reference(file.path)
            except (FileNotFoundError, Damaged):
                continue
        return parts

    @cached_property
    def owned(self) -> Owned:
        """The bytes of each blob that the cache itself has, in a file or in a container."""
        containers = self.of("container")
        inside = {}
        for digest, parts in self.parts.items():
            # A whole container begins where no tensor does, at its header; the blobs in it count.
            is_whole = [part.offset for part in parts] == [0]
            if not is_whole and any(key in containers for key in self.pinned(digest)):
                inside[digest] = sum(part.length for part in parts)
        return Owned(self.own_files, inside)

    @property
    def own_files(self) -> Files:
        """The blobs that have a file."""
        return cast(Files, self.kinds["blob"])

    @cached_property
    def _pinned(self) -> dict[str, set[str]]:
        # A part without a stamp lies in a file of the store's.
        paths = {d: [Path(p.path) for p in ps if p.stamp is None] for d, ps in self.parts.items()}
        return {d: {path.parent.name + path.name for path in ps} for d, ps in paths.items()}

    def pinned(self, digest: str) -> set[str]:
        """Return the keys of the blobs' and containers' files in which a reference's parts lie."""
        return self._pinned.get(digest, set())

    def reach(self, digests: Iterable[str]) -> set[str]:
        """Return ``digests`` and what they are a reference to."""
        reached = set(digests)
        return reached.union(*(self.pinned(digest) for digest in reached))

    def manifests(self) -> Iterator[Manifest]:
        """Yield what the action entries say, those that can be read."""
        for file in self.of("action").values():
            if manifest := Manifest.at(file.path):
                yield manifest


def inventory(root: Path, others: Iterable[RecordKind] = ()) -> Survey:
    """Look through a cache.

    Args:
        root: its folder, which need not exist.
        others: kinds of records in it besides the cache's own.

    Raises:
        NotACache: the folder holds something else.
    """
    folder.check(root)
    by_folder = {kind.folder: kind for kind in others}
    found: dict[str, Files] = {kind: Files(str(root), kind) for kind in _NAMES}
    rest: dict[str, dict[str, File]] = {}
    begin = len(os.path.join(root, ""))
    for path, status in (e for name in (*_FOLDERS, *by_folder) for e in _walk(f"{root}/{name}")):
        name = path[begin:]
        kind, key = _kind(name, by_folder)
        if not kind:
            continue
        size = status.st_size
        if stat.S_ISDIR(status.st_mode):
            size = sum(each.st_size for _, each in _walk(path)) or size
        if kind == "container":
            size = min(size, 512 * status.st_blocks)
        if kind in found:
            found[kind].add(key, size, status.st_mtime)
            continue
        file = File(str(root), name, kind, key, size, status.st_mtime)
        if kind in (other.name for other in by_folder.values()):  # one of a record's files
            file = _with(file, rest.get(kind, {}).get(key), name.partition("/")[0])
        # Memos of two kinds may have one key.
        rest.setdefault(kind, {})[name if kind == "memo" else key] = file
    kinds = {kind.name: kind for kind in by_folder.values()}
    return Survey(Blobs(root / "blobs"), {**found, **rest}, kinds)


def _with(file: File, record: File | None, folder: str) -> File:
    """Return a record's folder as one file, given those of its files that were seen before."""
    size, used = (record.size, record.used) if record else (0, 0.0)
    name = f"{folder}/{file.key}"
    return File(file.root, name, file.kind, file.key, size + file.size, max(used, file.used))


def _kind(name: str, others: Mapping[str, RecordKind]) -> tuple[str, str]:
    """Return the kind and key of the file ``name``, empty if it is none of the cache's.

    Args:
        name: its path below the cache's folder.
        others: kinds of records besides the cache's own, by folder.
    """
    if name.startswith(f"{CORRUPT}/"):
        kind, _ = _kind(name.removeprefix(f"{CORRUPT}/"), others)
        return (CORRUPT, name) if kind else ("", "")
    if name.rpartition("/")[2].startswith(atomic.TEMPORARY):
        return "temporary", name
    for kind, form in _KEYS.items():
        if match := form.fullmatch(name):
            return kind, match[1] + match[2]
    match = re.fullmatch(r"([^/]+)/([0-9a-f]{64})/.+", name)
    return (others[match[1]].name, match[2]) if match and match[1] in others else ("", "")


def _walk(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files below a folder, and temporary folders, by name; none that goes meanwhile."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(atomic.TEMPORARY):
            yield from _walk(entry.path)
        else:
            with suppress(FileNotFoundError):
                yield entry.path, entry.stat(follow_symlinks=False)
