"""rows: tensors read block by block of rows, so that memory does not grow with their size.

A *row* is one run along the last axis. Casting and quantizing look at no more than one row at a
time, so working block by block gives the same bits as working on the whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Protocol

import xxhash
from msgspec import Struct

from cache.blobs import Blobs, Part
from cache.digest import digest_parts
from cache.errors import BlobLost
from cache.records.manifests import DTYPE_BYTES, Tensor
from tasks.tensors import arrays, mx

BLOCK_BYTES = 4 << 20
IN_FLIGHT_BYTES = 32 << 20  # what working on blocks of one tensor takes, copies included


class Rows(Protocol):
    """A tensor that can be read by rows."""

    @property
    def dtype(self) -> str:
        """As MLX spells it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def unit(self) -> int:
        """Number of rows that must be read together: blocks begin at multiples of it."""

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``: (stop - start, columns)."""


def count(rows: Rows) -> int:
    """Return the number of rows; a vector is one row."""
    return prod(rows.shape[:-1])


def whole(rows: Rows) -> mx.array:
    """Return all of a tensor."""
    return rows.read(0, count(rows)).reshape(rows.shape)


def blocks(rows: Rows, block_bytes: int = BLOCK_BYTES) -> Iterator[mx.array]:
    """Yield all rows, in blocks of about ``block_bytes`` bytes: (rows, columns) each."""
    return (rows.read(start, stop) for start, stop in spans(rows, block_bytes))


def spans(rows: Rows, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each block of about ``block_bytes`` bytes, and the end of its rows."""
    row_bytes = max(1, (rows.shape[-1] if rows.shape else 1) * DTYPE_BYTES[rows.dtype])
    step = max(1, block_bytes // (row_bytes * rows.unit)) * rows.unit
    total = count(rows)
    for start in range(0, total, step):
        yield start, min(start + step, total)


class DigestCheck:
    """Checks bytes against their digests as they are read, one run of bytes after another.

    So nothing is made of a blob that decayed, or of a file that changed under the same stamp. What
    is read out of order is not checked.

    Attributes:
        segments: digest and length in bytes of each run of bytes, in order.
    """

    def __init__(self, segments: Sequence[tuple[str, int]]) -> None:
        self.segments = [segment for segment in segments if segment[1]]
        self._at = 0  # bytes that were checked
        self._left = list(reversed(self.segments))
        self._pending = (
            self._left[-1][1] if self._left else 0
        )  # bytes of the current segment to come
        self._state = xxhash.xxh3_128()

    def update(self, start: int, data: memoryview) -> None:
        """Take in bytes that were read.

        Args:
            start: where they begin among all.
            data: the bytes.

        Raises:
            BlobLost: a segment has ended, and has another digest.
        """
        if start != self._at:
            return
        self._at += data.nbytes
        while data.nbytes and self._left:
            piece = data[: self._pending]
            self._state.update(piece)
            self._pending -= piece.nbytes
            data = data[piece.nbytes :]
            if not self._pending:
                digest, _ = self._left.pop()
                if self._state.hexdigest() != digest:
                    raise BlobLost(digest, "its bytes are others")
                self._state.reset()
                self._pending = self._left[-1][1] if self._left else 0


class Stored(Struct, frozen=True):
    """A tensor whose bytes lie in files, in order; ``check``, if given, checks them as read."""

    blobs: Blobs
    parts: Sequence[Part]
    dtype: str
    shape: tuple[int, ...]
    unit: int = 1
    check: DigestCheck | None = None

    def read(self, start: int, stop: int, memory: mx.array | None = None) -> mx.array:
        """Return rows ``start`` to ``stop``, in ``memory`` if they fit, see ``arrays.read``."""
        columns = self.shape[-1] if self.shape else 1
        row_bytes = columns * DTYPE_BYTES[self.dtype]
        parts = arrays.slice_parts(self.parts, start * row_bytes, stop * row_bytes)
        shape = (stop - start, columns)
        if self.check is None:
            return arrays.read(self.blobs, parts, self.dtype, shape, memory)
        check, at = self.check, start * row_bytes
        return arrays.read(
            self.blobs,
            parts,
            self.dtype,
            shape,
            memory,
            on_read=lambda data: check.update(at, data),
        )

    def chunks(self) -> Iterator[memoryview]:
        """Yield all bytes in pieces, each valid until the next."""
        at = 0
        for data in self.blobs.chunks(self.parts):
            if self.check:
                self.check.update(at, data)
            at += data.nbytes
            yield data


class Header(Struct, frozen=True):
    """A tensor of which no more is known than its header."""

    dtype: str
    shape: tuple[int, ...]
    unit: int = 1

    def read(self, start: int, stop: int) -> mx.array:
        """Refuse to be read."""
        raise ValueError("there is nothing behind a header")


class Held(Struct, frozen=True):
    """A tensor in memory."""

    array: mx.array
    unit: int = 1

    @property
    def dtype(self) -> str:
        """As MLX spells it."""
        return arrays.dtype_name(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.array.shape)

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        columns = self.shape[-1] if self.shape else 1
        return self.array.reshape(-1, columns)[start:stop]


class Joined(Struct, frozen=True):
    """Matrices with the same number of rows, joined on the last axis."""

    sources: Sequence[Rows]
    unit: int = 1

    @property
    def dtype(self) -> str:
        """As MLX spells it."""
        return self.sources[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return (*self.sources[0].shape[:-1], sum(s.shape[-1] for s in self.sources))

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        return mx.concatenate([source.read(start, stop) for source in self.sources], axis=-1)


class Chained(Struct, frozen=True, dict=True):
    """Tensors of one dtype and width, their rows one after another, as ``shape``."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    unit: int = 1

    @property
    def dtype(self) -> str:
        """As MLX spells it."""
        return self.sources[0].dtype

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(count(source) for source in self.sources))

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        pieces = []
        for at in range(bisect_right(self._ends, start), len(self.sources)):
            source, end = self.sources[at], self._ends[at]
            begin = end - count(source)
            pieces.append(source.read(max(start, begin) - begin, min(stop, end) - begin))
            if end >= stop:
                break
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)


class Latest:
    """The tensor that was read last, of several that hold much while they are read."""

    def __init__(self) -> None:
        self.maker: Callable[[], Rows] | None = None
        self.made: Rows | None = None


class MadeWhenRead(Struct, frozen=True, dict=True):
    """A tensor that is made once it is read, and let go once another one of its kind is.

    Attributes:
        make: makes it.
        latest: what it shares with the others.
    """

    make: Callable[[], Rows]
    latest: Latest

    @cached_property
    def _header(self) -> Header:
        made = self.make()  # which holds nothing yet
        return Header(made.dtype, made.shape, made.unit)

    @property
    def dtype(self) -> str:
        """As MLX spells it."""
        return self._header.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._header.shape

    @property
    def unit(self) -> int:
        """Number of rows that must be read together."""
        return self._header.unit

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        if self.latest.maker is not self.make or self.latest.made is None:
            self.latest.made = None
            self.latest.maker, self.latest.made = self.make, self.make()
        return self.latest.made.read(start, stop)


class Cast(Struct, frozen=True):
    """A tensor in another dtype, rounded to nearest, ties to even."""

    source: Rows
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.source.shape

    @property
    def unit(self) -> int:
        """As of the source."""
        return self.source.unit

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        return self.source.read(start, stop).astype(getattr(mx, self.dtype))


class HalfSplit(Struct, frozen=True):
    """Rows of wq or wk, from interleaved to half-split rotary order."""

    source: Rows
    heads: int

    @property
    def dtype(self) -> str:
        """As MLX spells it."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.source.shape

    @property
    def unit(self) -> int:
        """A head."""
        return self.source.shape[0] // self.heads

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        return half_split(self.source.read(start, stop), heads=(stop - start) // self.unit)


class JoinedInMemory(Struct, frozen=True, dict=True):
    """Tensors joined on an axis that cannot be read row by row: joined in memory, at once."""

    sources: Sequence[Rows]
    step: str
    axis: int
    unit: int = 1

    @property
    def dtype(self) -> str:
        """As MLX spells it."""
        return self.sources[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._array.shape)

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        return self._array.reshape(-1, self.shape[-1])[start:stop]

    @cached_property
    def _array(self) -> mx.array:
        arrays = [s.read(0, count(s)).reshape(s.shape) for s in self.sources]
        join = mx.concatenate if self.step == "concatenate" else mx.stack
        return join(arrays, self.axis)


def half_split(weight: mx.array, *, heads: int) -> mx.array:
    """Reorder the rows of wq or wk from interleaved to half-split rotary order.

    Meta rotates rows 2i and 2i + 1 of a head together, Hugging Face rows i and i + d / 2
    (transformers, ``convert_llama_weights_to_hf.py``).

    Args:
        weight: (heads · d, width).
        heads: number of heads.

    Returns:
        (heads · d, width).
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)  # heads, d / 2, 2, width
    return pairs.swapaxes(1, 2).reshape(rows, width)


def end_to_end(sources: Sequence[Rows], shape: tuple[int, ...]) -> Stored:
    """Return stored tensors as one, their bytes one after another.

    Raises:
        ValueError: one is not stored, or their dtypes differ.
    """
    stored = [source for source in sources if isinstance(source, Stored)]
    if len(stored) != len(sources):
        raise ValueError("only stored tensors can be joined end to end")
    if any(source.dtype != stored[0].dtype for source in stored):
        raise ValueError("only tensors of one dtype can be joined end to end")
    parts = [part for source in stored for part in source.parts]
    checks = [source.check for source in stored]
    check = (
        DigestCheck([s for each in checks if each for s in each.segments]) if all(checks) else None
    )
    return Stored(stored[0].blobs, parts, stored[0].dtype, shape, check=check)


def pieces(source: Rows) -> Iterator[memoryview]:
    """Yield all bytes of a tensor in pieces, each valid until the next."""
    if isinstance(source, Stored):
        return source.chunks()
    return (arrays.view(block) for block in blocks(source))


def digest(blobs: Blobs, source: Rows, *, keep: bool) -> Tensor:
    """Read all of a tensor, and return its dtype, shape and digest.

    Args:
        blobs: the store.
        source: the tensor.
        keep: whether the store must have its bytes afterwards. A stored tensor is never copied.
    """
    if isinstance(source, Stored):
        digest = digest_parts(source.chunks())
        blobs.refer(digest, source.parts)
    elif keep:
        nbytes = Tensor(source.dtype, source.shape, "").nbytes
        with blobs.writing(nbytes) as writer:
            for data in pieces(source):
                writer.write(data)
        digest = writer.digest
    else:
        digest = digest_parts(pieces(source))
    return Tensor(source.dtype, source.shape, digest)
