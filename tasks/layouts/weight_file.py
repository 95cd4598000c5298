"""weights: weight files, safetensors and .npz, put together from blobs.

A file is laid out first: runs of bytes of its own (headers) between runs of other files (blobs).
Then one run after the other is read, digested and, unless it lies in its place already, written.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, repeat
from pathlib import Path
from struct import pack
from typing import Any, Protocol

import xxhash

from cache.blobs import Blobs, Part
from cache.digest import CHUNK_BYTES
from cache.errors import BlobLost
from cache.files import atomic
from cache.records.manifests import Tensor

AHEAD = 4  # pieces on their way
SAFETENSORS_DTYPES = {
    "bool_": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16",
    "uint32": "U32", "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "complex64": "C64",
}  # fmt: skip
# As mx.savez spells them; NumPy has no bfloat16, MLX reads two raw bytes as one.
NPY_DTYPES = {
    "bool_": "|b1", "uint8": "|u1", "int8": "|i1", "uint16": "<u2", "int16": "<i2",
    "uint32": "<u4", "int32": "<i4", "uint64": "<u8", "int64": "<i8", "float16": "<f2",
    "bfloat16": "<V2", "float32": "<f4", "complex64": "<c8",
}  # fmt: skip
ZIP32_LIMIT = 0xFFFFFFFF  # sizes and offsets from here on are in ZIP64 records
_IN_ZIP64 = 0xFFFFFFFF  # stands in their place
Shard = Sequence[tuple[str, Tensor]]  # a weight file's tensors by name, in order
Find = Callable[[str], tuple[str, Sequence[Part]]]  # by name: a digest, and where its bytes lie


class Hasher(Protocol):
    """What digests the bytes that it is given one after the other."""

    def update(self, data: memoryview, /) -> Any:
        """Take more bytes."""


def write(
    path: Path,
    shard: Shard,
    form: str,
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
        form: ``safetensors`` or ``npz``.
        blobs: the store.
        find: waits for a tensor if it must, and returns its digest and where its bytes lie.
        threads: how many may work out checksums.
        also: is given the file's bytes as well.

    Raises:
        BlobLost: a tensor's bytes are not those of its digest.
    """
    whole = xxhash.xxh3_128()
    buffers = cycle([memoryview(bytearray(CHUNK_BYTES)) for _ in range(AHEAD)])
    jobs: deque[Future[None]] = deque()
    with (
        open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file,
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(1) as writer,
    ):
        if not os.fstat(file.fileno()).st_size:
            atomic.reserve(file, sum(tensor.nbytes for _, tensor in shard))
        at = 0

        def put(data: memoryview, *, lies_there: bool = False) -> None:
            nonlocal at
            whole.update(data)
            if also:
                also.update(data)
            if not lies_there:
                jobs.append(writer.submit(atomic.write_all, file, data, at))
            at += data.nbytes
            if len(jobs) == AHEAD:  # the buffer that comes next may be this one's
                jobs.popleft().result()

        for piece in FORMATS[form](shard, _crcs(shard, blobs, find, pool)):
            if isinstance(piece, bytes):
                put(memoryview(piece))
                continue
            digest, parts = find(piece)
            lies_there = [(part.path, part.offset) for part in parts] == [(str(path), at)]
            state = xxhash.xxh3_128()
            for data in blobs.chunks(parts, None if lies_there else buffers):
                state.update(data)
                put(data, lies_there=lies_there)
            if state.hexdigest() != digest:
                raise BlobLost(digest, f"{piece} has other bytes there")
        for job in jobs:
            job.result()
        if os.fstat(file.fileno()).st_size > at:
            file.truncate(at)
    return Tensor("uint8", (at,), whole.hexdigest())


def offsets(shard: Shard, form: str) -> dict[str, int]:
    """Return by name where a weight file's tensors begin.

    Args:
        shard: its tensors, of which only dtypes and shapes need be known.
        form: ``safetensors`` or ``npz``.
    """
    found = {}
    at = 0
    sizes = {name: tensor.nbytes for name, tensor in shard}
    for piece in FORMATS[form](shard, repeat(0, len(shard))):
        if isinstance(piece, bytes):
            at += len(piece)
        else:
            found[piece] = at
            at += sizes[piece]
    return found


def _safetensors(shard: Shard, _crcs: Iterable[int]) -> Iterator[bytes | str]:
    """Lay out a safetensors file (https://github.com/huggingface/safetensors)."""
    raw = f"{{{','.join(_safetensors_entries(shard))}}}".encode()
    raw += b" " * (-len(raw) % 8)  # so that tensors begin on a multiple of 8
    yield len(raw).to_bytes(8, "little") + raw
    yield from (name for name, _ in shard)


def _safetensors_entries(shard: Shard) -> Iterator[str]:
    """Yield the header's entries, JSON each: a dictionary of them all takes five times the room."""
    dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    yield '"__metadata__":{"format":"mlx"}'
    offset = 0
    for name, tensor in shard:
        end = offset + tensor.nbytes
        entry = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        yield f"{dumps(name)}:{dumps(entry)}"
        offset = end


def _npz(shard: Shard, crcs: Iterable[int]) -> Iterator[bytes | str]:
    """Lay out an .npz file as mx.savez does: a zip archive of uncompressed .npy files.

    Dated 1980, so that equal weights are equal files. The format is PKWARE's APPNOTE 6.3.10,
    ZIP64 where a size or an offset needs it.
    """
    directory = []
    at = 0
    for (name, tensor), crc in zip(shard, crcs, strict=True):
        npy = _npy_header(tensor)
        size = len(npy) + tensor.nbytes
        local, central = _zip_entry(f"{name}.npy".encode(), crc, size, at)
        directory.append(central)
        yield local + npy
        yield name
        at += len(local) + size
    yield b"".join(directory) + _zip_end(len(directory), sum(map(len, directory)), at)


def _crcs(shard: Shard, blobs: Blobs, find: Find, pool: ThreadPoolExecutor) -> Iterator[int]:
    """Yield the CRC-32 of each tensor as a .npy file, some worked out ahead."""

    def check(packed: tuple[str, Tensor]) -> int:
        name, tensor = packed
        crc = zlib.crc32(_npy_header(tensor))
        for chunk in blobs.chunks(find(name)[1]):
            crc = zlib.crc32(chunk, crc)
        return crc

    yield from pool.map(check, shard)


def _zip_entry(name: bytes, crc: int, size: int, at: int) -> tuple[bytes, bytes]:
    """Return a member's header before its data, and its entry in the directory."""
    large = size >= ZIP32_LIMIT
    extra = pack("<HHQQ", 1, 16, size, size) if large else b""
    short = _IN_ZIP64 if large else size
    version = 45 if large else 20
    flags = 0 if name.isascii() else 0x800  # UTF-8
    common = pack("<HHHHHLLL", version, flags, 0, 0, 0x21, crc, short, short)
    local = b"PK\x03\x04" + common + pack("<HH", len(name), len(extra)) + name + extra

    far = at >= ZIP32_LIMIT
    fields = ((size, size) if large else ()) + ((at,) if far else ())
    extra = pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
    short_at = _IN_ZIP64 if far else at
    made_by = 0x0300 | (45 if fields else 20)  # Unix
    needs = 45 if fields else 20
    common = pack("<HHHHHHLLL", made_by, needs, flags, 0, 0, 0x21, crc, short, short)
    tail = pack("<HHHHHLL", len(name), len(extra), 0, 0, 0, 0o600 << 16, short_at)
    return local, b"PK\x01\x02" + common + tail + name + extra


def _zip_end(count: int, size: int, at: int) -> bytes:
    """Return what ends a zip archive whose directory of ``size`` bytes begins at ``at``."""
    end = b""
    if at >= ZIP32_LIMIT or count >= 0xFFFF:
        record = pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, size, at)
        end = b"PK\x06\x06" + record + b"PK\x06\x07" + pack("<LQL", 0, at + size, 1)
        count, at = 0xFFFF, _IN_ZIP64
    return end + b"PK\x05\x06" + pack("<HHHHLLH", 0, 0, count, count, size, at, 0)


def _npy_header(tensor: Tensor) -> bytes:
    """Return what comes before the data in a .npy file, version 1.0 (numpy.lib.format)."""
    shape = "".join(f"{size}, " for size in tensor.shape)
    dtype = NPY_DTYPES[tensor.dtype]
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + pack("<H", len(text)) + text.encode()


# Given the CRC-32s of .npy files if the format has any. Yields bytes, and the names of the tensors
# whose bytes come between them.
Layout = Callable[[Shard, Iterable[int]], Iterator[bytes | str]]
FORMATS: dict[str, Layout] = {"safetensors": _safetensors, "npz": _npz}
