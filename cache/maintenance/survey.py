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

from cache import folder
from cache.blobs import Blobs, Part
from cache.files import atomic
from cache.records.kinds import RecordKind
from cache.records.manifests import Manifest
from cache.records.sealed import Damaged

CORRUPT = "corrupt"  # the folder to which `verify` moves what is
_FOLDERS = ("blobs", "actions", "memos", CORRUPT)  # nothing beside them is ever looked at
_KEYS = {
    "blob": r"blobs/([0-9a-f]{2})/([0-9a-f]{30})",
    "reference": r"blobs/([0-9a-f]{2})/([0-9a-f]{30})\.parts",
    "container": r"blobs/(packs)/([0-9a-f]{32})",
    "action": r"actions/([0-9a-f]{2})/([0-9a-f]{30})\.json",
    "memo": r"memos/[^/]+/([0-9a-f]{2})/([0-9a-f]{30})\.json",
}


@dataclass(frozen=True)
class File:
    """A file of the cache; or a folder, if it is temporary, or a record of another kind.

    Attributes:
        path: where it lies.
        kind: blob, reference, container, action, memo, temporary, corrupt, or another kind of
            record. Files that nobody here made are of none, and left alone.
        key: the digest or key that names it.
        size: bytes; of a container, in which there may be holes, those that the disk has.
        used: when it was last used, Unix time, to the hour (``atomic.touch``).
    """

    path: Path
    kind: str
    key: str
    size: int
    used: float


@dataclass(frozen=True)
class Survey:
    """What a cache folder held when it was looked through.

    Attributes:
        blobs: the store's.
        files: all files.
        others: kinds of records besides the cache's own, by name.
    """

    blobs: Blobs
    files: list[File]
    others: Mapping[str, RecordKind] = field(default_factory=dict)

    def of(self, kind: str) -> dict[str, File]:
        """Return the files of a kind by key."""
        return {file.key: file for file in self.files if file.kind == kind}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

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
    def owned(self) -> dict[str, int]:
        """The bytes of each blob that the cache itself has, in a file or in a container."""
        sizes = {digest: file.size for digest, file in self.of("blob").items()}
        containers = self.of("container").keys()
        for digest, parts in self.parts.items():
            # A whole container begins where no tensor does, at its header; the blobs in it count.
            is_whole = [part.offset for part in parts] == [0]
            if self.pinned(digest) & containers and not is_whole:
                sizes.setdefault(digest, sum(part.length for part in parts))
        return sizes

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
    files = []
    for path, status in (each for name in (*_FOLDERS, *by_folder) for each in _walk(root / name)):
        kind, key = _kind(str(path.relative_to(root)), by_folder)
        if kind:
            inside = _walk(path) if stat.S_ISDIR(status.st_mode) else ()
            size = sum(each.st_size for _, each in inside) or status.st_size
            if kind == "container":
                size = min(size, 512 * status.st_blocks)
            files.append(File(path, kind, key, size, status.st_mtime))
    kinds = {kind.name: kind for kind in by_folder.values()}
    return Survey(Blobs(root / "blobs"), [*_whole_records(root, files, kinds)], kinds)


def _whole_records(
    root: Path, files: Iterable[File], others: Mapping[str, RecordKind]
) -> Iterator[File]:
    """Yield the files; those of one record of another kind as one, its folder."""
    records: dict[tuple[str, str], list[File]] = {}
    for file in files:
        if file.kind in others:
            records.setdefault((file.kind, file.key), []).append(file)
        else:
            yield file
    for (kind, key), parts in records.items():
        size, used = sum(file.size for file in parts), max(file.used for file in parts)
        yield File(root / others[kind].folder / key, kind, key, size, used)


def _kind(name: str, others: Mapping[str, RecordKind]) -> tuple[str, str]:
    """Return the kind and key of the file ``name``, empty if it is none of the cache's.

    Args:
        name: its path below the cache's folder.
        others: kinds of records besides the cache's own, by folder.
    """
    if name.startswith(f"{CORRUPT}/"):
        kind, _ = _kind(name.removeprefix(f"{CORRUPT}/"), others)
        return (CORRUPT, name) if kind else ("", "")
    if Path(name).name.startswith(atomic.TEMPORARY):
        return "temporary", name
    for kind, form in _KEYS.items():
        if match := re.fullmatch(form, name):
            return kind, match[1] + match[2]
    match = re.fullmatch(r"([^/]+)/([0-9a-f]{64})/.+", name)
    return (others[match[1]].name, match[2]) if match and match[1] in others else ("", "")


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files below a folder, and temporary folders; what goes meanwhile is not there."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(atomic.TEMPORARY):
            yield from _walk(path)
        else:
            with suppress(FileNotFoundError):
                yield path, entry.stat(follow_symlinks=False)
