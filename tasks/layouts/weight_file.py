"""weight_file: weight files of any format, put together from blobs.

A file is laid out first: runs of bytes of its own (headers) between runs of other files (blobs).
Then one run after the other is read, digested and, unless it lies in its place already, written.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import cycle, repeat
from pathlib import Path
from typing import Any, Protocol

import xxhash
from msgspec import Struct

from cache.blobs import Blobs, Part
from cache.digest import CHUNK_BYTES
from cache.errors import BlobLost
from cache.files import atomic, space
from cache.records.manifests import Tensor, TensorSpec

AHEAD = 4  # pieces on their way
Shard = Sequence[tuple[str, Tensor | TensorSpec]]  # a weight file's tensors by name, in order
Find = Callable[[str], tuple[str, Sequence[Part]]]  # by name: a digest, and where its bytes lie


class Hasher(Protocol):
    """What digests the bytes that it is given one after the other."""

    def update(self, data: memoryview, /) -> Any:
        """Take more bytes."""


def _no_prefix(_: Tensor | TensorSpec) -> bytes:
    return b""


class WeightFormat(Struct, frozen=True):
    """A format of weight files.

    Attributes:
        name: as keys of actions have it: changing it loses what was packed.
        suffix: what the names of its files end with.
        arrange: Lays out a file. It is given the tensors and, where the format has such, the CRC-32
            of each; it yields the file's own bytes, and the name of the tensor whose bytes come
            next.
        prefix: Returns the bytes in front of a tensor that its CRC-32 covers as well.
    """

    name: str
    suffix: str
    arrange: Callable[[Shard, Iterable[int]], Iterator[bytes | str]]
    prefix: Callable[[Tensor | TensorSpec], bytes] = _no_prefix


def write(
    path: Path,
    shard: Shard,
    weight_format: WeightFormat,
    blobs: Blobs,
    find: Find,
    threads: int,
    also: Hasher | None = None,
) -> Tensor:
    """Write a weight file, and return it as a tensor of bytes.

    This thread reads blobs, checks and digests them; one other writes what was digested behind it,
    since two that write to one file wait for each other in the kernel.

    Args:
        path: the file. All that is in it is written over, but what ``find`` says lies there.
        shard: its tensors, of which only dtypes and shapes need be known.
        weight_format: how the file is laid out.
        blobs: the store.
        find: waits for a tensor if it must, and returns its digest and where its bytes lie.
        threads: how many may work out checksums.
        also: is given the file's bytes as well.

    Raises:
        BlobLost: a tensor's bytes are not those of its digest.
    """
    with (
        open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file,
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(1) as writer,
    ):
        if not os.fstat(file.fileno()).st_size:
            space.reserve(file, sum(tensor.nbytes for _, tensor in shard))
        output = _Output(file, writer, also)
        crcs = _crcs(shard, weight_format, blobs, find, pool)
        for piece in weight_format.arrange(shard, crcs):
            if isinstance(piece, bytes):
                output.put(memoryview(piece))
                continue
            digest, parts = find(piece)
            lies_there = [(p.path, p.offset) for p in parts] == [(str(path), output.nbytes)]
            state = xxhash.xxh3_128()
            for data in blobs.chunks(parts, None if lies_there else output.buffers):
                state.update(data)
                output.put(data, lies_there=lies_there)
            if state.hexdigest() != digest:
                raise BlobLost(digest, f"{piece} has other bytes there")
        output.finish()
    return Tensor("uint8", (output.nbytes,), output.digest.hexdigest())


class _Output:
    """A file that is digested here and written by another thread, one piece after the other.

    Attributes:
        nbytes: how many bytes it was given.
        digest: of these.
        buffers: what pieces are to be read into, one after the other, for ever.
    """

    def __init__(self, file: FileIO, writer: ThreadPoolExecutor, also: Hasher | None) -> None:
        self.nbytes = 0
        self.digest = xxhash.xxh3_128()
        self.buffers = cycle([memoryview(bytearray(CHUNK_BYTES)) for _ in range(AHEAD)])
        self._file = file
        self._writer = writer
        self._also = also
        self._jobs: deque[Future[None]] = deque()

    def put(self, data: memoryview, *, lies_there: bool = False) -> None:
        """Add a piece, which is not written if it lies in its place already."""
        self.digest.update(data)
        if self._also:
            self._also.update(data)
        if not lies_there:
            self._jobs.append(self._writer.submit(atomic.write_all, self._file, data, self.nbytes))
        self.nbytes += data.nbytes
        if len(self._jobs) == AHEAD:  # the buffer that comes next may be this one's
            self._jobs.popleft().result()

    def finish(self) -> None:
        """Wait until all is written, and cut off what an earlier file had beyond it."""
        for job in self._jobs:
            job.result()
        if os.fstat(self._file.fileno()).st_size > self.nbytes:
            self._file.truncate(self.nbytes)


def offsets(shard: Shard, weight_format: WeightFormat) -> dict[str, int]:
    """Return by name where a weight file's tensors begin.

    Args:
        shard: its tensors, of which only dtypes and shapes need be known.
        weight_format: how the file is laid out.
    """
    starts = {}
    at = 0
    sizes = {name: tensor.nbytes for name, tensor in shard}
    for piece in weight_format.arrange(shard, repeat(0, len(shard))):
        if isinstance(piece, bytes):
            at += len(piece)
        else:
            starts[piece] = at
            at += sizes[piece]
    return starts


def _crcs(
    shard: Shard, weight_format: WeightFormat, blobs: Blobs, find: Find, pool: ThreadPoolExecutor
) -> Iterator[int]:
    """Yield the CRC-32 of each tensor, with what the format has in front, some worked out ahead."""

    def check(packed: tuple[str, Tensor | TensorSpec]) -> int:
        name, tensor = packed
        crc = zlib.crc32(weight_format.prefix(tensor))
        for chunk in blobs.chunks(find(name)[1]):
            crc = zlib.crc32(chunk, crc)
        return crc

    yield from pool.map(check, shard)
