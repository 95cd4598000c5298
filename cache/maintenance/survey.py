"""survey: what lies in a cache folder, and what of it is wanted."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

from cache import folder
from cache.blobs import Blobs, Part
from cache.files import atomic
from cache.maintenance.files import NAMES, File, Files
from cache.maintenance.references import Owned, References
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
    def references(self) -> References:
        """What the references say."""
        files = cast(Files, self.of("reference"))
        return References(files, self.of("container"), self._parts_of(files))

    def _parts_of(self, files: Files) -> Iterator[list[Part] | None]:
        """Yield where each reference says that its bytes lie; None, if it cannot be read."""
        for index in range(len(files)):
            try:
                yield self.blobs.reference(files.at(index).path)
            except (FileNotFoundError, Damaged):
                yield None

    @cached_property
    def owned(self) -> Owned:
        """The bytes of each blob that the cache itself has, in a file or in a container."""
        return Owned(self.own_files, self.references)

    @property
    def own_files(self) -> Files:
        """The blobs that have a file."""
        return cast(Files, self.kinds["blob"])

    def pinned(self, digest: str) -> frozenset[str]:
        """Return the keys of the blobs' and containers' files in which a reference's parts lie."""
        index = self.references.files.find(digest)
        return frozenset() if index is None else self.references.pinned(index)

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
    found: dict[str, Files] = {kind: Files(str(root), kind) for kind in NAMES}
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
