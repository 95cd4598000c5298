"""gguf_file: the float32 tensors of a GGUF file that is no model, read within bounds.

The package ``gguf`` believes what a header says: an array of 2^60 elements in a file of 64 bytes
takes it for ever, and all memory. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_BYTES = 16 << 30  # the largest mixtures of experts have a tenth of it
MAX_HEADER_BYTES = 16 << 20  # names and settings: these files have a tenth of a MiB
MAX_AXES = 4
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
_FLOAT32 = 0  # among the types of tensors
# Of values, by their number: how ``struct`` has them; strings and arrays are those of more parts.
_VALUES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_UINT32, _STRING, _ARRAY = 4, 8, 9


class _Place(NamedTuple):
    """Where a tensor lies: its axes, the slowest first, and its first byte behind the header."""

    shape: tuple[int, ...]
    offset: int


def read(path: Path) -> tuple[dict[str, str | int], dict[str, np.ndarray]]:
    """Return what a file says of itself, texts and counts alone, and its tensors, by name.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or has more than it may.
    """
    import numpy as np

    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, over {MAX_BYTES:,}")
    with path.open("rb") as file:
        header = _Header(file.read(MAX_HEADER_BYTES))
        said, places = header.read()
        begin = -(-header.at // header.alignment) * header.alignment
        nbytes = {name: 4 * prod(place.shape) for name, place in places.items()}
        if sum(nbytes.values()) > size:  # or some share their bytes
            raise ValueError(f"its tensors have more bytes than all of it, {size:,}")
        tensors = {}
        for name, (shape, offset) in places.items():
            if begin + offset + nbytes[name] > size:
                raise ValueError(f"{name} reaches past the end")
            file.seek(begin + offset)
            data = file.read(nbytes[name])
            tensors[name] = np.frombuffer(data, "<f4").reshape(shape)
    return said, tensors


class _Header:
    """What stands before the tensors' bytes.

    Attributes:
        at: how many bytes were read.
        alignment: of where the tensors begin.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0
        self.alignment = ALIGNMENT

    def read(self) -> tuple[dict[str, str | int], dict[str, _Place]]:
        """Return texts and counts, and where the tensors lie, both by name."""
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin as GGUF files do")
        version, tensors, settings = self._numbers("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version}")
        said = self._settings(settings)
        alignment = said.get(ALIGNMENT_KEY, ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{ALIGNMENT_KEY} is {alignment!r}")
        self.alignment = alignment
        return said, dict(self._places(tensors))

    def _settings(self, settings: int) -> dict[str, str | int]:
        said: dict[str, str | int] = {}
        names = set()
        for _ in range(settings):  # each takes bytes, of which there is an end
            name, (kind,) = self._text(), self._numbers("I")
            if name in names:
                raise ValueError(f"it says {name!r} twice")
            names.add(name)
            if kind == _STRING:
                said[name] = self._text()
            elif kind == _UINT32:
                (said[name],) = self._numbers("I")
            else:
                self._skip(kind)
        return said

    def _places(self, tensors: int) -> Iterator[tuple[str, _Place]]:
        names = set()
        for _ in range(tensors):
            name, (axes,) = self._text(), self._numbers("I")
            if name in names or axes > MAX_AXES:
                raise ValueError(f"{name!r} comes twice, or has {axes} axes")
            *shape, kind, offset = self._numbers(f"{axes}QIQ")
            if kind != _FLOAT32:
                raise ValueError(f"{name!r} is of type {kind}, and not of float32")
            names.add(name)
            yield name, _Place(tuple(reversed(shape)), offset)

    def _skip(self, kind: int) -> None:
        """Pass over a value of another kind, or an array of such, which holds no arrays."""
        if kind != _ARRAY:
            self._take(self._size(kind))
            return
        kind, count = self._numbers("IQ")
        if kind != _STRING:
            self._take(self._size(kind) * count)
            return
        for _ in range(count):
            self._text()

    @staticmethod
    def _size(kind: int) -> int:
        if kind not in _VALUES:
            raise ValueError(f"it has a value of type {kind}")
        return struct.calcsize(_VALUES[kind])

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        return self._take(length).decode()

    def _numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take(self, nbytes: int) -> bytes:
        data = self._data[self.at : self.at + nbytes]
        if len(data) != nbytes:
            raise ValueError(f"it ends in its header, or that has over {MAX_HEADER_BYTES:,} bytes")
        self.at += nbytes
        return data
