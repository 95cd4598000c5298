"""files: the files of a cache folder as they are kept in memory: there may be millions."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from heapq import merge
from pathlib import Path
from typing import Any

from msgspec import Struct

NAMES: dict[str, Callable[[str], str]] = {  # of those that there may be millions of, by key
    "blob": lambda key: f"blobs/{key[:2]}/{key[2:]}",
    "reference": lambda key: f"blobs/{key[:2]}/{key[2:]}.parts",
    "action": lambda key: f"actions/{key[:2]}/{key[2:]}.json",
}
_DIGEST_BYTES = 16
_SORTED_AT_ONCE = 1 << 16  # rows


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
        self._name = NAMES[kind]
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


def ordered(*columns: array[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of columns of equal length, sorted; they take no more memory than these do."""
    chunks = []
    for start in range(0, len(columns[0]), _SORTED_AT_ONCE):
        rows = sorted(
            zip(*(each[start : start + _SORTED_AT_ONCE] for each in columns), strict=True)
        )
        parts = zip(columns, zip(*rows, strict=True), strict=True)
        chunks.append([array(column.typecode, values) for column, values in parts])
    yield from merge(*(zip(*chunk, strict=True) for chunk in chunks))
