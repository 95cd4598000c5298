"""references: what the references of a cache say, in some 20 bytes each: there may be millions."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import nlargest
from itertools import chain
from pathlib import Path

from cache.blobs import Part
from cache.maintenance.files import File, Files, ordered

_NOWHERE, _SEVERAL = -1, -2


class References:
    """Where the bytes lie of blobs that are references, by their places in the order of these.

    Attributes:
        files: the references.
        keys: of the cache's own files, blobs and containers, in which parts lie.
        sizes: bytes of each blob; 0, it cannot be read.
        inside: whether each lies in a container, and is not the whole of it: there is no other file
            of these bytes.
    """

    def __init__(
        self,
        files: Files,
        containers: Mapping[str, File],
        every: Iterable[Sequence[Part] | None],
    ) -> None:
        """Take note of what is said.

        Args:
            files: the references.
            containers: by key.
            every: where each reference's bytes lie; None, it cannot be read.
        """
        self.files = files
        self.keys: list[str] = []
        self.sizes = array("Q")
        self.inside = bytearray()
        self._where = array("q")  # a place in `keys`
        self._several: dict[int, tuple[int, ...]] = {}  # places in `keys`, where it is not one
        self._elsewhere = array("Q"), array("Q"), array("Q")  # path, offset, length
        places: dict[str, int] = {}
        paths: dict[str, int] = {}
        for index, said in enumerate(every):
            parts = said or ()
            own = {}  # a part without a stamp lies in a file of the store's
            for part in parts:
                if part.stamp:
                    path = paths.setdefault(part.path, len(paths))
                    for column, value in zip(
                        self._elsewhere, (path, part.offset, part.length), strict=True
                    ):
                        column.append(value)
                elif part.path not in own:
                    own[part.path] = places.setdefault(_key(part.path), len(places))
            where = tuple(dict.fromkeys(own.values()))
            self._where.append(where[0] if len(where) == 1 else _SEVERAL if where else _NOWHERE)
            if len(where) > 1:
                self._several[index] = where
            self.sizes.append(sum(part.length for part in parts))
            # A whole container begins where no tensor does, at its header; the blobs in it count.
            is_whole = [part.offset for part in parts] == [0]
            self.inside.append(not is_whole and any(_key(path) in containers for path in own))
        self.keys += places

    def where(self, index: int) -> tuple[int, ...]:
        """Return the places in ``keys`` of the files in which a reference's parts lie."""
        place = self._where[index]
        if place == _SEVERAL:
            return self._several[index]
        return () if place == _NOWHERE else (place,)

    def pinned(self, index: int) -> frozenset[str]:
        """Return the keys of the files in which a reference's parts lie."""
        return frozenset(self.keys[place] for place in self.where(index))

    def elsewhere(self) -> int:
        """Return how many bytes of files that are not the cache's are named, each counted once."""
        total, last = 0, None
        for path, offset, length in ordered(*self._elsewhere):
            total += length if (path, offset) != last else 0
            last = path, offset
        return total


class Owned(Mapping[str, int]):
    """The bytes of each blob that the cache itself has, in a file or in a container.

    Attributes:
        files: those that have a file.
        references: of which some are of the others.
        inside: whether each of the references is.
    """

    def __init__(self, files: Files, references: References) -> None:
        self.files = files
        self.references = references
        self.inside = bytearray(references.inside)
        for index, inside in enumerate(self.inside):
            if inside and references.files.key_at(index) in files:
                self.inside[index] = False

    def find_inside(self, digest: str) -> int | None:
        """Return a blob's place among the references, if it is one of those without a file."""
        index = self.references.files.find(digest)
        return index if index is not None and self.inside[index] else None

    def every_inside(self) -> Iterator[int]:
        """Yield the places among the references of the blobs without a file."""
        return (index for index, inside in enumerate(self.inside) if inside)

    def __getitem__(self, digest: str) -> int:
        if (index := self.files.find(digest)) is not None:
            return self.files.sizes[index]
        if (index := self.find_inside(digest)) is None:
            raise KeyError(digest)
        return self.references.sizes[index]

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and (
            digest in self.files or self.find_inside(digest) is not None
        )

    def __iter__(self) -> Iterator[str]:
        return chain(self.files, map(self.references.files.key_at, self.every_inside()))

    def __len__(self) -> int:
        return len(self.files) + sum(self.inside)

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(self.files.sizes) + self.size_inside

    @property
    def size_inside(self) -> int:
        """Bytes of those without a file."""
        return sum(map(self.references.sizes.__getitem__, self.every_inside()))

    def largest(self, count: int) -> dict[str, int]:
        """Return the largest of them, in that order."""
        rows = (
            (sizes[index], files.key_at(index))
            for files, sizes, indexes in (
                (self.files, self.files.sizes, range(len(self.files))),
                (self.references.files, self.references.sizes, self.every_inside()),
            )
            for index in nlargest(count, indexes, key=sizes.__getitem__)
        )
        return {key: size for size, key in nlargest(count, rows, key=lambda row: row[0])}


def _key(path: str) -> str:
    """Return the key of a file of the cache's own: a blob's, or a container's."""
    own = Path(path)
    return own.parent.name + own.name
